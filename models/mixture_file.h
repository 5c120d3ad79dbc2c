#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "kernels/base/aligned_buffer.h"
#include "kernels/mixture.h"
#include "models/config.h"
#include "models/gguf.h"
#include "models/gguf_writer.h"

namespace moesaic::models {

/// How layers of the general form (kernels/mixture.h) stand in a GGUF, beside what
/// secret_moe_file.h says:
///
///   moesaic.layer.kind      EXPERT+ROUTER+GATE of the names below: "gelu+product_key+softmax"
///   moesaic.layer.n_active  experts that run per token
///
///   blk.N.moe.shared.weight       [n_shared, c, d_model]  c = 3 rows a neuron (gate, up, down) for
///                                 glu, else 2 (in, out); absent if n_shared is 0
///   blk.N.moe.shared.input_bias   [n_shared] F32, gelu alone
///   blk.N.moe.experts.weight      [n_experts, c, block, d_model]
///   blk.N.moe.experts.input_bias  [n_experts, block] F32, gelu alone
///   blk.N.moe.experts.mean        [n_experts, block] F32, may be absent: zeros
///   blk.N.moe.router_v.weight     [r, d_model]; [2 r, d_model] for product_key; absent for
///   full_rank blk.N.moe.router_u.weight     [n_experts, r]; [n_experts, d_model] for full_rank; [2
///   √n_experts,
///                                 r] for product_key
///   blk.N.moe.router.bias         [rows of router_u] F32
///   blk.N.moe.bypass_q.weight     [bypass_rank, d_model]   both absent if bypass_rank is 0
///   blk.N.moe.bypass_p.weight     [d_model, bypass_rank]
///   blk.N.moe.bias                [d_model] F32
inline constexpr std::string_view kMixtureKinds =
    "EXPERT+ROUTER+GATE of glu|gelu|linear, low_rank|full_rank|product_key, none|softmax|score";

/// "gelu+product_key+softmax".
std::string kind_name(const kernels::MixtureKind& kind);
/// Nothing where the name is none of these.
std::optional<kernels::MixtureKind> mixture_kind(std::string_view name);

/// The layer's view into the file, or nothing if layer N is of another kind. Throws FormatError for
/// a missing tensor or a shape that does not fit; names the tensor.
std::optional<kernels::MixtureView> read_mixture(const GgufFile& file, const ModelConfig& config,
                                                 int layer);

/// One layer's tensors in memory, packed in their file formats; the view points into them.
struct PackedMixture {
  kernels::MixtureKind kind;
  kernels::Activation phi = kernels::Activation::GeluTanh;  // of glu
  std::int64_t block = 1, n_active = 0;
  std::int64_t d_model = 0, n_shared = 0, n_experts = 0;
  std::int64_t router_rank = 0;  // r; d_model at full rank
  std::int64_t bypass_rank = 0;
  DType expert_dtype = DType::BF16;  // shared and experts
  DType router_dtype = DType::BF16;  // router_v, router_u, bypass_q, bypass_p
  AlignedBuffer<std::byte> shared, experts, router_v, router_u, bypass_q, bypass_p;
  AlignedBuffer<float> shared_bias, expert_bias;  // empty but for gelu
  AlignedBuffer<float> expert_mean;               // or empty
  AlignedBuffer<float> router_bias, bias;

  /// Rows of router_v and router_u.
  std::int64_t router_v_rows() const;
  std::int64_t router_u_rows() const { return static_cast<std::int64_t>(router_bias.size()); }

  kernels::MixtureView view() const;
  /// Adds the layer's tensors to a writer; *this must live until write().
  void add_to(GgufWriter& writer, int layer) const;
};

}  // namespace moesaic::models
