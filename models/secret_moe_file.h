#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "kernels/base/aligned_buffer.h"
#include "kernels/secret_moe.h"
#include "models/config.h"
#include "models/gguf.h"
#include "models/gguf_writer.h"

namespace moesaic::models {

/// How secret-MoE layers stand in a GGUF (DESIGN.md section 4): metadata under `moesaic.*`, tensors
/// `blk.N.moe.*`.
///
///   moesaic.format_version  u32      1
///   moesaic.layer.kind      [string] per layer: "dense" or "glu+low_rank"
///   moesaic.layer.n_active  [u32]    per layer k (0 where dense)
///   moesaic.recipe, moesaic.data_digest, moesaic.source_digest, moesaic.source_file  string
///   moesaic.active_fraction f32      mean over layers, router and bypass counted
///
///   blk.N.moe.shared.weight   [n_shared, 3, d_model]    absent if n_shared is 0
///   blk.N.moe.experts.weight  [n_experts, 3, d_model]   gate, up, down row per expert
///   blk.N.moe.experts.mean    [n_experts] F32
///   blk.N.moe.router_v.weight [router_rank, d_model]
///   blk.N.moe.router_u.weight [n_experts, router_rank]
///   blk.N.moe.router.bias     [n_experts] F32
///   blk.N.moe.bypass_q.weight [bypass_rank, d_model]    both absent if bypass_rank is 0
///   blk.N.moe.bypass_p.weight [d_model, bypass_rank]
///   blk.N.moe.bias            [d_model] F32
/// The dense tensors ffn_gate, ffn_up, ffn_down of a converted layer are absent.
inline constexpr std::uint32_t kSecretMoeFormatVersion = 1;

/// The metadata keys and layer kinds above, shared by reader and converter.
inline constexpr std::string_view kKeyFormatVersion = "moesaic.format_version";
inline constexpr std::string_view kKeyLayerKind = "moesaic.layer.kind";
inline constexpr std::string_view kKeyLayerActive = "moesaic.layer.n_active";
inline constexpr std::string_view kKeyRecipe = "moesaic.recipe";
inline constexpr std::string_view kKeyDataDigest = "moesaic.data_digest";
inline constexpr std::string_view kKeySourceDigest = "moesaic.source_digest";
inline constexpr std::string_view kKeySourceFile = "moesaic.source_file";
inline constexpr std::string_view kKeyActiveFraction = "moesaic.active_fraction";
inline constexpr std::string_view kKindDense = "dense";
inline constexpr std::string_view kKindGluLowRank = "glu+low_rank";

/// True if the file holds at least one converted layer.
bool is_hybrid(const GgufFile& file);

/// What layer N is: kKindDense, kKindGluLowRank or a kind of self_routed_file.h; dense in a file
/// without our metadata. Throws FormatError for an unknown version or kind (lists the known ones).
std::string layer_kind(const GgufFile& file, const ModelConfig& config, int layer);

/// The layer's view into the file, or nothing if layer N is of another kind. Throws FormatError for
/// a missing tensor or a shape that does not fit.
std::optional<kernels::SecretMoeView> read_secret_moe(const GgufFile& file,
                                                      const ModelConfig& config, int layer);

/// One layer's tensors in memory, packed in their file formats; the view points into them.
struct PackedSecretMoe {
  kernels::Activation phi = kernels::Activation::Silu;
  std::int64_t n_active = 0;
  std::int64_t d_model = 0, n_shared = 0, n_experts = 0, router_rank = 0, bypass_rank = 0;
  DType expert_dtype = DType::BF16;  // shared and experts
  DType router_dtype = DType::BF16;  // router_v, router_u, bypass_q, bypass_p
  AlignedBuffer<std::byte> shared, experts, router_v, router_u, bypass_q, bypass_p;
  AlignedBuffer<float> expert_mean, router_bias, bias;

  kernels::SecretMoeView view() const;
  /// Adds the layer's tensors to a writer; *this must live until write().
  void add_to(GgufWriter& writer, int layer) const;
};

}  // namespace moesaic::models
