#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "converter/study/layer_data.h"
#include "converter/study/paper_student.h"

namespace moesaic::converter::study {

/// What the paper (arXiv 2512.18452) reports for Gemma-3-270M layer 9, WikiText-2, 100 passes,
/// 10,000 experts: an ordering and a shape to compare with. Its absolute figures do not carry over
/// (DESIGN.md section 6: which tokens its data held is not known). Nothing where it has no row.
std::optional<double> published(Inputs inputs, Family family, std::int64_t n_neurons);

/// True for the layer that the rows are of.
bool has_published_rows(std::string_view architecture, int n_layers, std::int64_t d_model,
                        int layer);

}  // namespace moesaic::converter::study
