#include "converter/report_figures.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "converter/report_axes.h"
#include "converter/svg.h"

namespace moesaic::converter {

bool is_converted(const LayerReport& layer) { return layer.kind != "dense"; }

std::int64_t never_selected(const LayerReport& layer) {
  return std::count(layer.expert_usage.begin(), layer.expert_usage.end(), 0.0F);
}

std::string figure_error(const ConvertReport& report) {
  constexpr double kBase = 300;
  const bool routed = std::any_of(report.layers.begin(), report.layers.end(), is_self_routed);
  const bool trained = std::any_of(report.layers.begin(), report.layers.end(), is_mixture);
  Svg svg(
      "fig-error", kFigureWidth, kBase + kFigureBottom, "Output error per layer",
      routed ? "For each converted layer, the share of the MLP output's variance on calibration "
               "tokens that its thresholds leave unexplained. Lower is better."
      : trained
          ? "For each converted layer, the share of the MLP output's variance on held-out tokens "
            "that the student trained from a random start leaves unexplained. Lower is better."
          : "For each converted layer, the share of the MLP output's variance on held-out tokens "
            "that the secret mixture of experts leaves unexplained: an open ring for the "
            "closed-form start, a filled dot after distillation. Lower is better.");
  const Bands bands{report.layers.size()};
  double max = 0;
  bool any_dense = false;
  for (const LayerReport& l : report.layers) {
    any_dense |= !is_converted(l);
    if (!is_converted(l)) continue;
    max = std::max({max, finite_or_zero(l.error_closed_form), finite_or_zero(l.error_distilled)});
  }
  const ValueAxis axis =
      draw_value_axis(svg, kFigureTop, kBase, 0, max, 5, "unexplained variance", plain_value);
  draw_layer_axis(svg, bands, report, kBase);
  if (routed) {
    draw_legend(svg, {{"after", "with its thresholds", true}, {"dense", "stays dense"}});
  } else if (trained) {
    draw_legend(svg, {{"after", "after training", true}, {"dense", "stays dense"}});
  } else if (any_dense) {
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
    if (is_self_routed(l)) {
      if (!std::isfinite(l.error_closed_form)) continue;
      svg.circle(x, axis.y(l.error_closed_form), r, "after",
                 fmt::format("layer {}: {}", l.layer, number(l.error_closed_form, 4)));
      continue;
    }
    const std::string tip =
        trained ? fmt::format("layer {}: {}", l.layer, number(l.error_distilled, 4))
                : fmt::format("layer {}: {} closed form, {} distilled", l.layer,
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

std::string figure_usage(const ConvertReport& report) {
  struct UsageClass {
    float above;  // selected by more than this share of tokens
    std::string_view css, label, meaning;
  };
  constexpr std::array<UsageClass, 7> kClasses = {{
      {0.75F, "u6", "> 75 %", "by more than 75 % of tokens"},
      {0.50F, "u5", "50–75", "by 50–75 % of tokens"},
      {0.25F, "u4", "25–50", "by 25–50 % of tokens"},
      {0.10F, "u3", "10–25", "by 10–25 % of tokens"},
      {0.02F, "u2", "2–10", "by 2–10 % of tokens"},
      {0.0F, "u1", "≤ 2 %", "by at most 2 % of tokens"},
      {-1.0F, "u0", "never", "by no token"},
  }};
  const bool routed = std::any_of(report.layers.begin(), report.layers.end(), is_self_routed);
  const std::string_view verb = routed ? "kept" : "selected";
  const std::string_view noun = routed ? "neurons" : "experts";
  constexpr double kRightLabels = 104;
  constexpr double kStripWidth = kFigureWidth - kFigureLeft - kRightLabels;
  const double row = report.layers.size() > 40 ? 13 : 15;
  const double base = kFigureTop + 14 + row * static_cast<double>(report.layers.size());
  Svg svg("fig-usage", kFigureWidth, base + kFigureBottom, "Expert usage per layer",
          fmt::format("One strip a layer: its {} from the most to the least used, coloured by the "
                      "share of calibration tokens by which they are {}. To the right, how many "
                      "are {} by none.",
                      noun, verb, verb));
  double x = kFigureLeft;
  svg.text(kFigureLeft, 12, fmt::format("{} by this share of calibration tokens", verb), "legend");
  for (const UsageClass& c : kClasses) {
    svg.rect(x, 22, 12, 11, c.css);
    svg.text(x + 17, 31.5, c.label, "legend");
    x += 78;
  }
  svg.text(kFigureWidth - 2, 47, fmt::format("never {}", verb), "tick end");
  double y = kFigureTop + 14;
  for (const LayerReport& l : report.layers) {
    svg.text(kFigureLeft - 8, y + row / 2 + 3.5, std::to_string(l.layer), "tick end");
    const auto n = static_cast<double>(l.expert_usage.size());
    if (!is_converted(l) || l.expert_usage.empty()) {
      svg.rect(kFigureLeft, y + 1, kStripWidth, row - 2, "dense",
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
      svg.rect(kFigureLeft + kStripWidth * left, y + 1, kStripWidth * share, row - 2, c.css,
               fmt::format("layer {}: {} of {} {} ({}) {} {}", l.layer, count,
                           l.expert_usage.size(), noun, figure_percent(share), verb, c.meaning));
      left += share;
    }
    svg.text(kFigureWidth - 2, y + row / 2 + 3.5,
             fmt::format("{} of {}", never_selected(l), l.n_experts), "tick end");
    y += row;
  }
  for (const double t : {0.0, 0.25, 0.5, 0.75, 1.0}) {
    const double tick_x = kFigureLeft + kStripWidth * t;
    svg.line(tick_x, base, tick_x, base + 4, "axis");
    svg.text(tick_x, base + 17, number(100 * t, 0) + " %", "tick mid");
  }
  svg.text(kFigureLeft + kStripWidth / 2, base + 36,
           fmt::format("{} of the layer, most used first", noun), "axis-title mid");
  svg.vertical_text(13, (kFigureTop + 14 + base) / 2, "layer", "axis-title");
  return svg.str();
}

std::string figure_ranks(const ConvertReport& report) {
  constexpr double kBase = 240;
  Svg svg("fig-ranks", kFigureWidth, kBase + kFigureBottom, "Rank of router and bypass per layer",
          "For each converted layer, the rank of the low-rank router and of the low-rank bypass.");
  const Bands bands{report.layers.size()};
  std::int64_t max = 0;
  for (const LayerReport& l : report.layers) max = std::max({max, l.router_rank, l.bypass_rank});
  const ValueAxis axis = draw_value_axis(svg, kFigureTop, kBase, 0, static_cast<double>(max), 4,
                                         "rank", [](double v) { return number(v, 2); });
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
