#pragma once

#include <filesystem>
#include <span>
#include <string>

#include "converter/convert.h"
#include "converter/state.h"
#include "models/gguf.h"

namespace moesaic::converter {

/// Writes the hybrid: the dense file's metadata (general.name marked as hybrid, everything else
/// kept) and `moesaic.*` keys, its tensors as they were and in their order, a converted layer's
/// ffn_gate/up/down replaced by its `blk.N.moe.*` tensors. Atomic (models::GgufWriter).
/// Deterministic: no times, no paths but the source's file name.
void assemble(const models::GgufFile& dense, std::span<const SavedLayer> layers,
              const ConvertOptions& options, const ConvertReport& report,
              const std::filesystem::path& output);

/// Bytes that assemble() will write at most, before the layers exist: the dense file's size plus
/// routers and bypass.
std::int64_t estimate_output_bytes(const models::GgufFile& dense);

}  // namespace moesaic::converter
