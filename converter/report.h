#pragma once

#include <string>

#include "converter/convert.h"

namespace moesaic::converter {

/// Keys as in DESIGN.md section 5: seconds, peak_memory_bytes, active_fraction, layers [{layer,
/// kind, n_shared, n_experts, n_active, router_rank, bypass_rank, error_closed_form,
/// error_distilled, active_fraction, sensitivity, n_never_selected}], and model, output, data,
/// recipe, seed, n_tokens, source_digest, data_digest. NaN and infinity become null.
/// n_never_selected counts the experts that no calibration token selected.
std::string report_json(const ConvertOptions& options, const ConvertReport& report);

/// One self-contained page (no script, font or image from outside) with inline SVG: error per layer
/// before and after distillation, the budget per layer (shared, selected, router, bypass as parts
/// of the dense MLP) beside its measured sensitivity, expert usage per layer (sorted usage curve or
/// strip; experts that never fire counted), router rank, and the table behind the pictures.
/// Readable in light and dark, on a phone, and printed.
std::string report_html(const ConvertOptions& options, const ConvertReport& report);

}  // namespace moesaic::converter
