#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>

#include "converter/convert.h"
#include "converter/state.h"
#include "models/gguf.h"
#include "models/gguf_writer.h"

namespace moesaic::converter {

/// Writes the hybrid: the dense file's metadata (general.name marked as hybrid, everything else
/// kept) and `moesaic.*` keys, its tensors as they were and in their order, a converted layer's
/// ffn_gate/up/down replaced by its `blk.N.moe.*` tensors. Atomic (models::GgufWriter).
/// Deterministic: no times, no paths but the source's file name.
///
/// Besides the keys of models/secret_moe_file.h, for readers of the file (nothing depends on them):
///   moesaic.layer.{n_shared,n_experts,router_rank,bypass_rank}  [u32] per layer
///   moesaic.layer.{active_fraction,sensitivity}                 [f32] per layer
///   moesaic.layer.{error_closed_form,error_distilled}           [f32] per layer
///   moesaic.seed, moesaic.calibration_tokens                    u64
///   moesaic.active_target                                       f32
///
/// `layers` holds every layer of the model in order. Throws InputError otherwise, FormatError if
/// the dense file lacks what is to be replaced, IoError.
void assemble(const models::GgufFile& dense, std::span<const SavedLayer> layers,
              const ConvertOptions& options, const ConvertReport& report,
              const std::filesystem::path& output);

/// The metadata of a hybrid: the dense file's, and what assemble() adds; for self-routed layers
/// their shares (models/self_routed_file.h).
void set_hybrid_metadata(models::GgufWriter& writer, const models::GgufFile& dense,
                         std::span<const LayerReport> layers, const ConvertOptions& options,
                         const ConvertReport& report);

/// Bytes that assemble() will write at most, before the layers exist: the dense file's size, plus
/// what its MLPs grow by where their format cannot be written, plus routers and bypass of a rank up
/// to d_model / 4 each. `expert_dtype`, `router_dtype` as in ConvertOptions; `more_neurons`: that a
/// layer gets beyond its MLP's.
std::int64_t estimate_output_bytes(const models::GgufFile& dense,
                                   std::optional<DType> expert_dtype = {},
                                   std::optional<DType> router_dtype = {},
                                   std::int64_t more_neurons = 0);

}  // namespace moesaic::converter
