#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "converter/report_axes.h"
#include "converter/report_figures.h"
#include "converter/svg.h"

namespace moesaic::converter {
namespace {

constexpr double kBase = 280;
constexpr std::size_t kMostDots = 40;  // more of them would hide the line

/// 1500000 → "1.5 M".
std::string compact(double n) {
  if (n >= 1e6) return number(n / 1e6, 2) + " M";
  return n >= 1e3 ? number(n / 1e3, 1) + " k" : number(n, 0);
}

using Line = std::vector<std::pair<double, double>>;  // tokens, KL

void draw_line(Svg& svg, const Line& line, double most_tokens, const ValueAxis& axis,
               std::string_view css, std::string_view name) {
  const auto x = [&](double tokens) { return kFigureLeft + kPlotWidth * tokens / most_tokens; };
  for (std::size_t i = 1; i < line.size(); ++i) {
    svg.line(x(line[i - 1].first), axis.y(line[i - 1].second), x(line[i].first),
             axis.y(line[i].second), css);
  }
  if (line.size() > kMostDots) return;
  for (const auto& [tokens, kl] : line) {
    svg.circle(x(tokens), axis.y(kl), 3, css,
               fmt::format("{} tokens: {} KL {}", compact(tokens), name, number(kl, 4)));
  }
}

}  // namespace

std::string figure_recovery(const RecoveryReport& recovery) {
  Svg svg("fig-recovery", kFigureWidth, kBase + kFigureBottom, "KL divergence during recovery",
          "KL divergence from the dense model in nats a token, over the tokens trained on: on "
          "held-out text from before the training on, on the training text as the mean since the "
          "point before. Lower is better.");
  Line held_out, training;
  const auto add = [](Line& line, double tokens, double kl) {
    if (std::isfinite(kl)) line.emplace_back(tokens, kl);
  };
  add(held_out, 0, recovery.kl_start);
  double most_tokens = 1, most_kl = 0;
  for (const RecoveryReport::Point& p : recovery.curve) {
    const auto tokens = static_cast<double>(p.tokens);
    add(held_out, tokens, p.held_out);
    add(training, tokens, p.kl);
    most_tokens = std::max(most_tokens, tokens);
  }
  for (const Line* line : {&held_out, &training}) {
    for (const auto& [tokens, kl] : *line) most_kl = std::max(most_kl, kl);
  }
  const ValueAxis axis =
      draw_value_axis(svg, kFigureTop, kBase, 0, most_kl, 5, "KL, nats a token", plain_value);
  for (const double t : nice_ticks(most_tokens, 6)) {
    if (t > most_tokens) break;
    const double x = kFigureLeft + kPlotWidth * t / most_tokens;
    svg.line(x, kBase, x, kBase + 4, "axis");
    svg.text(std::min(x, kFigureWidth - kFigureRight - 8), kBase + 17, compact(t), "tick mid");
  }
  svg.text(kFigureLeft + kPlotWidth / 2, kBase + 36, "tokens trained on", "axis-title mid");
  draw_legend(svg, {{"held-out", "held-out text", true}, {"training", "training text", true}});
  draw_line(svg, training, most_tokens, axis, "training", "training");
  draw_line(svg, held_out, most_tokens, axis, "held-out", "held-out");
  return svg.str();
}

}  // namespace moesaic::converter
