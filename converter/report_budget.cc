#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "converter/report_axes.h"
#include "converter/report_figures.h"
#include "converter/svg.h"
#include "models/mixture_file.h"
#include "models/self_routed_file.h"

namespace moesaic::converter {
namespace {

struct Part {
  double share;
  std::string_view css, label;
};

std::vector<Part> stack_of(const LayerReport& layer) {
  if (is_self_routed(layer)) {
    const RoutedParts p = routed_parts(layer);
    return {{p.gate, "part-gate", "gate columns"},
            {p.up, "part-up", is_up_by_input(layer) ? "up columns" : "up rows"},
            {p.down, "part-down", "down columns"}};
  }
  const BudgetParts p = budget_parts(layer);
  return {{p.shared, "shared", "shared neurons"},
          {p.selected, "selected", "selected neurons"},
          {p.router, "router", "router"},
          {p.bypass, "bypass", "bypass"}};
}

void draw_budget_legend(Svg& svg, const ConvertReport& report) {
  const auto& layers = report.layers;
  if (std::any_of(layers.begin(), layers.end(), is_self_routed)) {
    const bool by_input = std::any_of(layers.begin(), layers.end(), is_up_by_input);
    draw_legend(svg, {{"part-gate", "gate columns"},
                      {"part-up", by_input ? "up columns" : "up rows"},
                      {"part-down", "down columns"},
                      {"dense", "stays dense"}});
  } else if (std::any_of(layers.begin(), layers.end(), is_converted)) {
    draw_legend(svg, {{"shared", "shared"},
                      {"selected", "selected"},
                      {"router", "router"},
                      {"bypass", "bypass"},
                      {"dense", "stays dense"}});
  } else {
    draw_legend(svg, {{"dense", "stays dense"}});
  }
}

// KL divergences below the budget, on an axis of their own.
void draw_sensitivities(Svg& svg, const ConvertReport& report, const Bands& bands, double gap,
                        double top, double base) {
  double min = 0, max = 0;
  for (const LayerReport& l : report.layers) {
    min = std::min(min, finite_or_zero(l.sensitivity));
    max = std::max(max, finite_or_zero(l.sensitivity));
  }
  const ValueAxis axis = draw_value_axis(svg, top, base, min, max, 3, "KL, nats", plain_value);
  svg.text(kFigureLeft, top - 14,
           "KL divergence from the dense model with this layer alone converted", "panel-title");
  for (std::size_t i = 0; i < report.layers.size(); ++i) {
    const LayerReport& l = report.layers[i];
    const double kl = finite_or_zero(l.sensitivity);
    svg.rect(bands.left(i) + gap, axis.y(std::max(kl, 0.0)), bands.width() - 2 * gap,
             std::max(1.0, std::abs(axis.y(0) - axis.y(kl))), is_converted(l) ? "rise" : "dense",
             fmt::format("layer {}: KL {}", l.layer, number(l.sensitivity, 4)));
  }
}

}  // namespace

bool is_up_by_input(const LayerReport& layer) { return layer.kind == models::kKindGluInput; }

RoutedParts routed_parts(const LayerReport& layer) {
  if (!is_self_routed(layer)) return {};
  const Shares& s = layer.shares;
  return {s.input / 3, (is_up_by_input(layer) ? s.input : s.gate) / 3, s.hidden / 3};
}

bool has_sensitivities(const ConvertReport& report) {
  return std::any_of(report.layers.begin(), report.layers.end(),
                     [](const LayerReport& l) { return finite_or_zero(l.sensitivity) != 0; });
}

BudgetParts budget_parts(const LayerReport& layer) {
  const auto d_ff =
      static_cast<double>(layer.d_ff > 0 ? layer.d_ff : layer.n_shared + layer.n_experts);
  if (!is_converted(layer) || is_self_routed(layer) || d_ff <= 0) return {};
  // Rows of a neuron: three in a gated MLP.
  const auto kind = models::mixture_kind(layer.kind);
  const double neuron = kind ? static_cast<double>(kernels::rows_per_neuron(kind->expert)) / 3 : 1;
  BudgetParts parts;
  parts.shared = neuron * static_cast<double>(layer.n_shared) / d_ff;
  parts.selected = neuron * static_cast<double>(layer.n_active * layer.expert_neurons) / d_ff;
  parts.bypass = 2 * static_cast<double>(layer.bypass_rank) / (3 * d_ff);
  parts.router =
      std::max(0.0, layer.active_fraction - parts.shared - parts.selected - parts.bypass);
  return parts;
}

std::string figure_budget(const ConvertReport& report) {
  constexpr double kBase = 264;
  constexpr double kLowTop = 312;
  constexpr double kLowBase = 420;
  const bool two_panels = has_sensitivities(report);
  const double end = two_panels ? kLowBase : kBase;
  const std::string_view parts =
      std::any_of(report.layers.begin(), report.layers.end(), is_self_routed)
          ? "columns of the gate, rows or columns of up and columns of down that are read"
          : "shared neurons, selected neurons, router and bypass";
  Svg svg("fig-budget", kFigureWidth, end + kFigureBottom, "Budget per layer",
          fmt::format("Multiply-adds per token of each layer as a share of the dense MLP, stacked "
                      "from {}; the dashed line is the mean over layers.{}",
                      parts,
                      two_panels ? " Below: KL divergence from the dense model's next tokens, in "
                                   "nats, when this layer alone is converted."
                                 : ""));
  const Bands bands{report.layers.size()};
  double max = 1;
  for (const LayerReport& l : report.layers) max = std::max(max, finite_or_zero(l.active_fraction));
  const ValueAxis axis =
      draw_value_axis(svg, kFigureTop, kBase, 0, max, 4, "share of the dense MLP", figure_percent);
  draw_layer_axis(svg, bands, report, end);
  draw_budget_legend(svg, report);
  const double gap = std::min(3.0, bands.width() * 0.15);
  const double w = bands.width() - 2 * gap;
  for (std::size_t i = 0; i < report.layers.size(); ++i) {
    const LayerReport& l = report.layers[i];
    const double x = bands.left(i) + gap;
    if (!is_converted(l)) {
      svg.rect(x, axis.y(l.active_fraction), w, axis.y(0) - axis.y(l.active_fraction), "dense",
               fmt::format("layer {}: stays dense, 100 %", l.layer));
      continue;
    }
    double sum = 0;
    for (const auto& [part, css, label] : stack_of(l)) {
      if (!(part > 0)) continue;
      svg.rect(x, axis.y(sum + part), w, axis.y(sum) - axis.y(sum + part), css,
               fmt::format("layer {}: {} {}; in all {}", l.layer, label, figure_percent(part),
                           figure_percent(l.active_fraction)));
      sum += part;
    }
  }
  if (two_panels) draw_sensitivities(svg, report, bands, gap, kLowTop, kLowBase);
  if (!report.layers.empty()) {
    const double y = axis.y(report.active_fraction);
    svg.line(kFigureLeft, y, kFigureWidth - kFigureRight, y, "mean");
    svg.text(kFigureWidth - kFigureRight, 18, "- - mean " + figure_percent(report.active_fraction),
             "legend end");
  }
  return svg.str();
}

}  // namespace moesaic::converter
