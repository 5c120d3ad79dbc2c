#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

#include "converter/convert.h"
#include "converter/self_routed/plan.h"
#include "converter/stream.h"
#include "engine/monitor.h"
#include "models/gguf.h"

namespace moesaic::converter {

/// Thresholds of all layers for a plan's shares, layer by layer on the stream of the hybrid as far
/// as it exists, so that each layer is fitted on what it will see. Empty for layers that stay
/// dense. `reports` receives a row per layer, its usage
/// counted. `tokens` [n_windows · n_ctx]. Throws as ThresholdFit,
/// Interrupted.
std::vector<Thresholds> apply_plan(Passes& passes, const RoutedPlan& plan,
                                   std::span<const std::int32_t> tokens, std::int64_t n_ctx,
                                   std::vector<LayerReport>& reports, engine::Monitor& monitor);

/// Writes the hybrid: the dense file's tensors as they were, a converted layer's thresholds behind
/// its own (models/self_routed_file.h), and the metadata of assemble.h. Atomic. Throws IoError.
void write_self_routed(const models::GgufFile& dense, std::span<const Thresholds> thresholds,
                       const ConvertOptions& options, const ConvertReport& report,
                       const std::filesystem::path& output);

}  // namespace moesaic::converter
