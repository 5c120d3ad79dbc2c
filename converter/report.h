#pragma once

#include <string>

#include "converter/convert.h"

namespace moesaic::converter {

/// Keys as in DESIGN.md section 5: seconds, peak_memory_bytes, active_fraction, layers [{layer,
/// kind, n_shared, n_experts, n_active, router_rank, bypass_rank, error_closed_form,
/// error_distilled, active_fraction, sensitivity, n_never_selected; of self-routed layers
/// input_share, gate_share, hidden_share}], and model, output, data, recipe, seed, n_tokens,
/// source_digest, data_digest. NaN and infinity become null. n_never_selected counts the experts
/// that no calibration token selected or kept.
std::string report_json(const ConvertOptions& options, const ConvertReport& report);

/// One self-contained page (no script, font or image from outside) with inline SVG: error per layer
/// (with low-rank routers before and after distillation), the budget per layer (shared, selected,
/// router, bypass, or columns and rows of the three matrices, as parts of the dense MLP) beside its
/// sensitivity, expert usage per layer (strips; experts that never fire counted), router rank, the
/// loss during a recovery, and the table behind the pictures. What a method does not have is left
/// out.
/// Readable in light and dark, on a phone, and printed.
std::string report_html(const ConvertOptions& options, const ConvertReport& report);

}  // namespace moesaic::converter
