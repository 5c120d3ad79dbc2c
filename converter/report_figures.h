#pragma once

#include <string>

#include "converter/convert.h"

namespace moesaic::converter {

// The pictures of the report, each a complete <svg> element for a page that defines the classes of
// report_html.cc. They never divide by zero: a report without layers gives empty axes.

bool is_converted(const LayerReport& layer);
/// Experts of the layer that no calibration token selected.
std::int64_t never_selected(const LayerReport& layer);
/// Multiply-adds of the layer's parts over the dense MLP's, from the layer's own counts: a neuron
/// costs 1/d_ff, the bypass 2q/(3 d_ff), and the router is what remains of the active fraction.
struct BudgetParts {
  double shared = 0, selected = 0, bypass = 0, router = 0;
};
BudgetParts budget_parts(const LayerReport& layer);

/// Output error per layer, closed form and distilled.
std::string figure_error(const ConvertReport& report);
/// Parts of the dense MLP that each layer still runs, over its measured sensitivity.
std::string figure_budget(const ConvertReport& report);
/// One strip a layer: its experts, most used first, coloured by how often they are selected.
std::string figure_usage(const ConvertReport& report);
/// Rank of router and bypass per layer.
std::string figure_ranks(const ConvertReport& report);

}  // namespace moesaic::converter
