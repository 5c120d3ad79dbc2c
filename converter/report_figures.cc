#include "converter/report_figures.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <tuple>

#include "converter/svg.h"

namespace moesaic::converter {
namespace {

constexpr double kWidth = 760;
constexpr double kLeft = 58;   // room for the y axis
constexpr double kRight = 14;  // so that the last label is not cut
constexpr double kTop = 40;    // room for the legend
constexpr double kPlotWidth = kWidth - kLeft - kRight;
constexpr double kBottom = 44;  // layer numbers and axis title

std::string percent(double fraction) { return number(100 * fraction, 1) + " %"; }

double finite_or_zero(double v) { return std::isfinite(v) ? v : 0; }

/// Columns of one chart: layer i of n has its own band.
struct Bands {
  std::size_t n;
  double width() const { return kPlotWidth / static_cast<double>(std::max<std::size_t>(n, 1)); }
  double left(std::size_t i) const { return kLeft + width() * static_cast<double>(i); }
  double centre(std::size_t i) const { return left(i) + width() / 2; }
};

/// A value axis between y = top (its last tick) and y = bottom (its first, `low`).
struct ValueAxis {
  double top, bottom, low, high;
  double y(double v) const {
    return bottom - (finite_or_zero(v) - low) / (high - low) * (bottom - top);
  }
};

/// Grid lines, tick labels and the axis title; returns the scale. Values from `min` (0 or below).
ValueAxis draw_value_axis(Svg& svg, double top, double bottom, double min, double max, int n_ticks,
                          std::string_view title, const std::function<std::string(double)>& label) {
  std::vector<double> ticks = nice_ticks(std::max(max, -min), n_ticks);
  const double step = ticks[1];
  while (ticks.size() > 2 && ticks[ticks.size() - 2] >= max) ticks.pop_back();
  while (ticks.front() > min) ticks.insert(ticks.begin(), ticks.front() - step);
  const ValueAxis axis{top, bottom, ticks.front(), ticks.back()};
  for (const double t : ticks) {
    svg.line(kLeft, axis.y(t), kWidth - kRight, axis.y(t),
             std::abs(t) < step / 2 ? "axis" : "grid");
    svg.text(kLeft - 8, axis.y(t) + 4, label(t), "tick end");
  }
  svg.vertical_text(13, (top + bottom) / 2, title, "axis-title");
  return axis;
}

/// Layer numbers under the columns, thinned so that they do not touch.
void draw_layer_axis(Svg& svg, const Bands& bands, const ConvertReport& report, double y) {
  const std::size_t every =
      std::max<std::size_t>(1, static_cast<std::size_t>(std::ceil(20 / bands.width())));
  for (std::size_t i = 0; i < bands.n; i += every) {
    svg.text(bands.centre(i), y + 17, std::to_string(report.layers[i].layer), "tick mid");
  }
  svg.text(kLeft + kPlotWidth / 2, y + 36, "layer", "axis-title mid");
}

struct LegendEntry {
  std::string_view css, label;
  bool dot = false;
};

void draw_legend(Svg& svg, std::initializer_list<LegendEntry> entries, double x = kLeft) {
  constexpr double kCharWidth = 6.6;  // of the legend's 12 px sans, rounded up
  for (const LegendEntry& e : entries) {
    if (e.dot) {
      svg.circle(x + 6, 14, 4.5, e.css);
    } else {
      svg.rect(x, 8.5, 12, 11, e.css);
    }
    svg.text(x + 18, 18, e.label, "legend");
    x += 18 + kCharWidth * static_cast<double>(e.label.size()) + 14;
  }
}

std::string plain_value(double v) { return number(v, 4); }

}  // namespace

bool is_converted(const LayerReport& layer) { return layer.kind != "dense"; }

std::int64_t never_selected(const LayerReport& layer) {
  return std::count(layer.expert_usage.begin(), layer.expert_usage.end(), 0.0F);
}

BudgetParts budget_parts(const LayerReport& layer) {
  const auto d_ff = static_cast<double>(layer.n_shared + layer.n_experts);
  if (!is_converted(layer) || d_ff <= 0) return {};
  BudgetParts parts;
  parts.shared = static_cast<double>(layer.n_shared) / d_ff;
  parts.selected = static_cast<double>(layer.n_active) / d_ff;
  parts.bypass = 2 * static_cast<double>(layer.bypass_rank) / (3 * d_ff);
  parts.router =
      std::max(0.0, layer.active_fraction - parts.shared - parts.selected - parts.bypass);
  return parts;
}

std::string figure_error(const ConvertReport& report) {
  constexpr double kBase = 300;
  Svg svg(
      "fig-error", kWidth, kBase + kBottom, "Output error per layer",
      "For each converted layer, the share of the MLP output's variance on held-out tokens that "
      "the secret mixture of experts leaves unexplained: an open ring for the closed-form "
      "start, a filled dot after distillation. Lower is better.");
  const Bands bands{report.layers.size()};
  double max = 0;
  bool any_dense = false;
  for (const LayerReport& l : report.layers) {
    any_dense |= !is_converted(l);
    if (!is_converted(l)) continue;
    max = std::max({max, finite_or_zero(l.error_closed_form), finite_or_zero(l.error_distilled)});
  }
  const ValueAxis axis =
      draw_value_axis(svg, kTop, kBase, 0, max, 5, "unexplained variance", plain_value);
  draw_layer_axis(svg, bands, report, kBase);
  if (any_dense) {
    draw_legend(
        svg,
        {{"before", "closed form", true}, {"after", "distilled", true}, {"dense", "stays dense"}});
  } else {
    draw_legend(svg, {{"before", "closed form", true}, {"after", "distilled", true}});
  }
  const double r = std::clamp(bands.width() / 4, 2.0, 4.5);
  for (std::size_t i = 0; i < report.layers.size(); ++i) {
    const LayerReport& l = report.layers[i];
    const double x = bands.centre(i);
    if (!is_converted(l)) {
      svg.rect(bands.left(i) + bands.width() * 0.15, kBase - 6, bands.width() * 0.7, 6, "dense",
               fmt::format("layer {}: stays dense, no error", l.layer));
      continue;
    }
    const std::string tip =
        fmt::format("layer {}: {} closed form, {} distilled", l.layer,
                    number(l.error_closed_form, 4), number(l.error_distilled, 4));
    const bool before = std::isfinite(l.error_closed_form);
    const bool after = std::isfinite(l.error_distilled);
    if (before && after) {
      svg.line(x, axis.y(l.error_closed_form), x, axis.y(l.error_distilled), "stem");
    }
    if (before) svg.circle(x, axis.y(l.error_closed_form), r, "before", tip);
    if (after) svg.circle(x, axis.y(l.error_distilled), r, "after", tip);
  }
  return svg.str();
}

std::string figure_budget(const ConvertReport& report) {
  constexpr double kBase = 264;
  constexpr double kLowTop = 312;
  constexpr double kLowBase = 420;
  Svg svg("fig-budget", kWidth, kLowBase + kBottom, "Budget and sensitivity per layer",
          "Above: multiply-adds per token of each layer as a share of the dense MLP, stacked from "
          "shared neurons, selected neurons, router and bypass; the dashed line is the mean over "
          "layers. Below: KL divergence from the dense model's next tokens, in nats, when this "
          "layer alone is converted.");
  const Bands bands{report.layers.size()};
  double max = 1;
  double min_rise = 0;
  double max_rise = 0;
  for (const LayerReport& l : report.layers) {
    max = std::max(max, finite_or_zero(l.active_fraction));
    min_rise = std::min(min_rise, finite_or_zero(l.sensitivity));
    max_rise = std::max(max_rise, finite_or_zero(l.sensitivity));
  }
  const ValueAxis axis = draw_value_axis(svg, kTop, kBase, 0, max, 4, "share of the dense MLP",
                                         [](double v) { return number(100 * v, 1) + " %"; });
  const ValueAxis low =
      draw_value_axis(svg, kLowTop, kLowBase, min_rise, max_rise, 3, "KL, nats", plain_value);
  svg.text(kLeft, kLowTop - 14,
           "Sensitivity: KL divergence from the dense model (nats) with this layer alone converted",
           "panel-title");
  draw_layer_axis(svg, bands, report, kLowBase);
  draw_legend(svg, {{"shared", "shared"},
                    {"selected", "selected"},
                    {"router", "router"},
                    {"bypass", "bypass"},
                    {"dense", "stays dense"}});
  const double gap = std::min(3.0, bands.width() * 0.15);
  const double w = bands.width() - 2 * gap;
  for (std::size_t i = 0; i < report.layers.size(); ++i) {
    const LayerReport& l = report.layers[i];
    const double x = bands.left(i) + gap;
    if (is_converted(l)) {
      const BudgetParts p = budget_parts(l);
      const std::array<std::tuple<double, std::string_view, std::string_view>, 4> stack = {{
          {p.shared, "shared", "shared neurons"},
          {p.selected, "selected", "selected neurons"},
          {p.router, "router", "router"},
          {p.bypass, "bypass", "bypass"},
      }};
      double sum = 0;
      for (const auto& [part, css, label] : stack) {
        if (part <= 0) continue;
        svg.rect(x, axis.y(sum + part), w, axis.y(sum) - axis.y(sum + part), css,
                 fmt::format("layer {}: {} {}; in all {}", l.layer, label, percent(part),
                             percent(l.active_fraction)));
        sum += part;
      }
    } else {
      svg.rect(x, axis.y(l.active_fraction), w, axis.y(0) - axis.y(l.active_fraction), "dense",
               fmt::format("layer {}: stays dense, 100 %", l.layer));
    }
    const double rise = finite_or_zero(l.sensitivity);
    svg.rect(x, low.y(std::max(rise, 0.0)), w, std::max(1.0, std::abs(low.y(0) - low.y(rise))),
             is_converted(l) ? "rise" : "dense",
             fmt::format("layer {}: KL {}", l.layer, number(l.sensitivity, 4)));
  }
  if (!report.layers.empty()) {
    const double y = axis.y(report.active_fraction);
    svg.line(kLeft, y, kWidth - kRight, y, "mean");
    svg.text(kWidth - kRight, 18, "- - mean " + percent(report.active_fraction), "legend end");
  }
  return svg.str();
}

std::string figure_usage(const ConvertReport& report) {
  struct UsageClass {
    float above;  // selected by more than this share of tokens
    std::string_view css, label, meaning;
  };
  constexpr std::array<UsageClass, 7> kClasses = {{
      {0.75F, "u6", "> 75 %", "selected by more than 75 % of tokens"},
      {0.50F, "u5", "50–75", "selected by 50–75 % of tokens"},
      {0.25F, "u4", "25–50", "selected by 25–50 % of tokens"},
      {0.10F, "u3", "10–25", "selected by 10–25 % of tokens"},
      {0.02F, "u2", "2–10", "selected by 2–10 % of tokens"},
      {0.0F, "u1", "≤ 2 %", "selected by at most 2 % of tokens"},
      {-1.0F, "u0", "never", "never selected"},
  }};
  constexpr double kRightLabels = 104;
  constexpr double kStripWidth = kWidth - kLeft - kRightLabels;
  const double row = report.layers.size() > 40 ? 13 : 15;
  const double base = kTop + 14 + row * static_cast<double>(report.layers.size());
  Svg svg(
      "fig-usage", kWidth, base + kBottom, "Expert usage per layer",
      "One strip a layer: its experts from the most to the least used, coloured by the share of "
      "calibration tokens that select them. To the right, how many experts no token selected.");
  double x = kLeft;
  svg.text(kLeft, 12, "selected by this share of calibration tokens", "legend");
  for (const UsageClass& c : kClasses) {
    svg.rect(x, 22, 12, 11, c.css);
    svg.text(x + 17, 31.5, c.label, "legend");
    x += 78;
  }
  svg.text(kWidth - 2, 47, "never selected", "tick end");
  double y = kTop + 14;
  for (const LayerReport& l : report.layers) {
    svg.text(kLeft - 8, y + row / 2 + 3.5, std::to_string(l.layer), "tick end");
    const auto n = static_cast<double>(l.expert_usage.size());
    if (!is_converted(l) || l.expert_usage.empty()) {
      svg.rect(kLeft, y + 1, kStripWidth, row - 2, "dense",
               is_converted(l) ? fmt::format("layer {}: usage not recorded", l.layer)
                               : fmt::format("layer {}: stays dense", l.layer));
      y += row;
      continue;
    }
    double left = 0;  // share of the experts already drawn
    float below = std::numeric_limits<float>::infinity();
    for (const UsageClass& c : kClasses) {
      const auto count = std::count_if(l.expert_usage.begin(), l.expert_usage.end(),
                                       [&](float u) { return u > c.above && u <= below; });
      below = c.above;
      if (count == 0) continue;
      const double share = static_cast<double>(count) / n;
      svg.rect(kLeft + kStripWidth * left, y + 1, kStripWidth * share, row - 2, c.css,
               fmt::format("layer {}: {} of {} experts ({}) {}", l.layer, count,
                           l.expert_usage.size(), percent(share), c.meaning));
      left += share;
    }
    svg.text(kWidth - 2, y + row / 2 + 3.5, fmt::format("{} of {}", never_selected(l), l.n_experts),
             "tick end");
    y += row;
  }
  for (const double t : {0.0, 0.25, 0.5, 0.75, 1.0}) {
    const double tick_x = kLeft + kStripWidth * t;
    svg.line(tick_x, base, tick_x, base + 4, "axis");
    svg.text(tick_x, base + 17, number(100 * t, 0) + " %", "tick mid");
  }
  svg.text(kLeft + kStripWidth / 2, base + 36, "experts of the layer, most used first",
           "axis-title mid");
  svg.vertical_text(13, (kTop + 14 + base) / 2, "layer", "axis-title");
  return svg.str();
}

std::string figure_ranks(const ConvertReport& report) {
  constexpr double kBase = 240;
  Svg svg("fig-ranks", kWidth, kBase + kBottom, "Rank of router and bypass per layer",
          "For each converted layer, the rank of the low-rank router and of the low-rank bypass.");
  const Bands bands{report.layers.size()};
  std::int64_t max = 0;
  for (const LayerReport& l : report.layers) max = std::max({max, l.router_rank, l.bypass_rank});
  const ValueAxis axis = draw_value_axis(svg, kTop, kBase, 0, static_cast<double>(max), 4, "rank",
                                         [](double v) { return number(v, 2); });
  draw_layer_axis(svg, bands, report, kBase);
  draw_legend(svg, {{"router", "router rank r"}, {"bypass", "bypass rank q"}});
  const double gap = std::min(3.0, bands.width() * 0.15);
  const double w = (bands.width() - 2 * gap) / 2;
  for (std::size_t i = 0; i < report.layers.size(); ++i) {
    const LayerReport& l = report.layers[i];
    if (!is_converted(l)) continue;
    const double x = bands.left(i) + gap;
    const auto bar = [&](double bar_x, std::int64_t rank, std::string_view css,
                         std::string_view what) {
      const double top = axis.y(static_cast<double>(rank));
      svg.rect(bar_x, top, w, kBase - top, css,
               fmt::format("layer {}: {} rank {}", l.layer, what, rank));
    };
    bar(x, l.router_rank, "router", "router");
    bar(x + w, l.bypass_rank, "bypass", "bypass");
  }
  return svg.str();
}

}  // namespace moesaic::converter
