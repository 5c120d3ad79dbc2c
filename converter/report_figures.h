#pragma once

#include <string>

#include "converter/convert.h"

namespace moesaic::converter {

// The pictures of the report, each a complete <svg> element for a page that defines the classes of
// report_style.cc. They never divide by zero: a report without layers gives empty axes. Each draws
// layers of any kind.

bool is_converted(const LayerReport& layer);
/// Experts of the layer that no calibration token selected or kept.
std::int64_t never_selected(const LayerReport& layer);
/// Multiply-adds of the layer's parts over the dense MLP's, from the layer's own counts: a neuron
/// of three rows costs 1/d_ff, the bypass 2q/(3 d_ff), and the router, with the gate, is what
/// remains of the active fraction.
struct BudgetParts {
  double shared = 0, selected = 0, bypass = 0, router = 0;
};
BudgetParts budget_parts(const LayerReport& layer);

/// The same of a self-routed layer (active_fraction() in shares.h): a third of the dense MLP each.
struct RoutedParts {
  double gate = 0, up = 0, down = 0;
};
RoutedParts routed_parts(const LayerReport& layer);
/// Whether it reads columns of W_up as of W_gate ("glu+input").
bool is_up_by_input(const LayerReport& layer);
/// Whether any layer's sensitivity is known.
bool has_sensitivities(const ConvertReport& report);

/// Output error per layer: closed form and distilled, or one for layers that are not distilled.
std::string figure_error(const ConvertReport& report);
/// Parts of the dense MLP that each layer still runs, over its sensitivity where one is known.
std::string figure_budget(const ConvertReport& report);
/// One strip a layer: its experts, most used first, coloured by how often they are selected or
/// kept.
std::string figure_usage(const ConvertReport& report);
/// Rank of router and bypass per layer.
std::string figure_ranks(const ConvertReport& report);
/// KL divergence from the dense model over the tokens trained on: held-out text and training text.
std::string figure_recovery(const RecoveryReport& recovery);

}  // namespace moesaic::converter
