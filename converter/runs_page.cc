#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <span>

#include "converter/report_style.h"
#include "converter/runs.h"
#include "converter/svg.h"

namespace moesaic::converter {
namespace {

constexpr double kWidth = 760, kHeight = 420;
constexpr double kLeft = 58, kRight = 20, kTop = 64, kBottom = 50;

/// Colours of recipes, in light and dark; a ninth recipe takes the first one's again.
constexpr std::size_t kColours = 8;
constexpr std::string_view kStyle = R"css(
svg .c0 { fill: #0b6e69; } svg .c1 { fill: #dd8a2e; } svg .c2 { fill: #1d4f91; }
svg .c3 { fill: #b4475d; } svg .c4 { fill: #8d68bd; } svg .c5 { fill: #6b8e23; }
svg .c6 { fill: #4a90c2; } svg .c7 { fill: #7a5c3e; }
svg .front { stroke: var(--accent); stroke-width: 2; }
svg .point { stroke: var(--paper); }
svg .value { fill: var(--ink); }
td.best { font-weight: 650; }
td:nth-child(1), th:nth-child(1) { text-align: left; }
@media (prefers-color-scheme: dark) {
  svg .c0 { fill: #3fcabd; } svg .c2 { fill: #5b9bea; } svg .c3 { fill: #e0788c; }
  svg .c4 { fill: #b193dd; } svg .c5 { fill: #a3c853; } svg .c7 { fill: #c39b74; }
}
)css";

std::string fixed(double value, int decimals) {
  return std::isfinite(value) ? fmt::format("{:.{}f}", value, decimals) : "–";
}

/// Which colour each recipe has on the whole page.
using Colours = std::map<std::string, std::size_t>;

Colours colours_of(const std::vector<Run>& runs) {
  std::set<std::string> recipes;
  for (const Run& run : runs) recipes.insert(run.recipe);
  Colours colours;
  for (const std::string& recipe : recipes) colours.emplace(recipe, colours.size() % kColours);
  return colours;
}

/// Fractions to x from `low` to `high`, ratios to y from 1 (or less) up.
struct Plane {
  double low, high, bottom, top;
  double x(double fraction) const {
    return kLeft + (fraction - low) / (high - low) * (kWidth - kLeft - kRight);
  }
  double y(double ratio) const {
    return kHeight - kBottom - (ratio - bottom) / (top - bottom) * (kHeight - kTop - kBottom);
  }
};

bool drawable(const Run& run) {
  return run.quality && std::isfinite(run.quality->ratio) && std::isfinite(run.active_fraction);
}

bool has_out(const Run& run) {
  return run.quality->ratio_out && std::isfinite(*run.quality->ratio_out);
}

Plane draw_axes(Svg& svg, std::span<const Run> runs) {
  double low = 1, high = 0, least = 1, most = 1.1;
  for (const Run& run : runs) {
    if (!drawable(run)) continue;
    low = std::min(low, run.active_fraction);
    high = std::max(high, run.active_fraction);
    least = std::min(least, run.quality->ratio);
    most = std::max(most, run.quality->ratio);
    if (has_out(run)) most = std::max(most, *run.quality->ratio_out);
  }
  // Whole tenths with room on both sides.
  low = std::max(0.0, std::floor(low * 10 - 0.2) / 10);
  high = std::max(low + 0.2, std::ceil(high * 10 + 0.2) / 10);
  const std::vector<double> ticks = nice_ticks(most - 1, 5);
  const double step = ticks[1];
  const double below = std::ceil((1 - least) / step) * step;  // 0 unless a hybrid beats its model
  const Plane plane{low, high, 1 - below, 1 + ticks.back()};
  for (double t = -below; t <= ticks.back() + step / 2; t += step) {
    const double y = plane.y(1 + t);
    svg.line(kLeft, y, kWidth - kRight, y, std::abs(t) < step / 2 ? "axis" : "grid");
    svg.text(kLeft - 8, y + 4, number(1 + t, 3), "tick end");
  }
  const double base = kHeight - kBottom;
  const auto n_tenths = static_cast<int>(std::lround((high - low) * 10));
  for (int i = 0; i <= n_tenths; ++i) {
    const double fraction = low + i / 10.0;
    svg.line(plane.x(fraction), base, plane.x(fraction), base + 4, "axis");
    svg.text(plane.x(fraction), base + 17, number(fraction, 1), "tick mid");
  }
  svg.text((kLeft + kWidth - kRight) / 2, base + 38, "active fraction of the MLPs",
           "axis-title mid");
  svg.vertical_text(13, (kTop + base) / 2, "perplexity over dense", "axis-title");
  return plane;
}

void draw_legend(Svg& svg, std::span<const Run> runs, const Colours& colours) {
  constexpr double kCharWidth = 6.6;  // of the legend's 12 px sans, rounded up
  std::set<std::string> recipes;
  bool any_out = false;
  for (const Run& run : runs) {
    recipes.insert(run.recipe);
    any_out |= drawable(run) && has_out(run);
  }
  double x = kLeft, y = 14;
  const auto entry = [&](const std::string& css, const std::string& label) {
    const double width = 18 + kCharWidth * static_cast<double>(label.size()) + 14;
    if (x > kLeft && x + width > kWidth) {
      x = kLeft;
      y += 20;
    }
    svg.circle(x + 6, y, 4.5, css);
    svg.text(x + 18, y + 4, label, "legend");
    x += width;
  };
  for (const std::string& recipe : recipes) {
    entry(fmt::format("c{}", colours.at(recipe)), "recipe " + recipe);
  }
  if (any_out) entry("before", "out of domain");
}

/// `runs` are those of one group.
std::string figure(std::string_view id, std::span<const Run> runs, const Colours& colours) {
  Svg svg(
      id, kWidth, kHeight, "Perplexity ratio against active fraction",
      "Every run as a dot coloured by its recipe; rings: the same on text of other domains. The "
      "line joins the runs that no other betters at their fraction or a lower one. Lower and "
      "further left is better.");
  draw_legend(svg, runs, colours);
  const Plane plane = draw_axes(svg, runs);
  const Run* previous = nullptr;
  for (const Run& run : runs) {
    if (!drawable(run) || !run.best) continue;
    if (previous != nullptr) {
      svg.line(plane.x(previous->active_fraction), plane.y(previous->quality->ratio),
               plane.x(run.active_fraction), plane.y(run.quality->ratio), "front");
    }
    previous = &run;
  }
  for (const Run& run : runs) {
    if (!drawable(run)) continue;
    const double x = plane.x(run.active_fraction);
    const double y = plane.y(run.quality->ratio);
    std::string tip =
        fmt::format("{} ({}): {} of the MLPs active, {} × the dense perplexity", run.name,
                    run.recipe, number(run.active_fraction, 3), number(run.quality->ratio, 3));
    if (has_out(run)) {
      const double y_out = plane.y(*run.quality->ratio_out);
      tip += fmt::format(", {} × out of domain", number(*run.quality->ratio_out, 3));
      svg.line(x, y, x, y_out, "stem");
      svg.circle(x, y_out, 4, "before", tip);
    }
    svg.circle(x, y, 5, fmt::format("point c{}", colours.at(run.recipe)), tip);
    if (run.best) svg.text(x + 8, y - 7, fixed(run.quality->ratio, 2), "value");
  }
  return svg.str();
}

std::string duration(const std::optional<double>& seconds) {
  if (!seconds || !std::isfinite(*seconds) || *seconds < 0) return "–";
  const auto minutes = static_cast<long>(std::lround(*seconds / 60));
  return minutes < 60 ? fmt::format("{} min", minutes)
                      : fmt::format("{} h {} min", minutes / 60, minutes % 60);
}

std::string table(std::span<const Run> runs) {
  std::string out =
      "<div class=\"scroll\"><table>\n<thead><tr><th>hybrid</th><th>recipe</th>"
      "<th>active fraction</th><th>perplexity</th><th>dense</th><th>ratio</th>"
      "<th>out of domain</th><th>KL, nats</th><th>same "
      "top</th><th>time</th></tr></thead>\n<tbody>\n";
  for (const Run& run : runs) {
    out += fmt::format("<tr><td>{}</td><td>{}</td><td>{}</td>", escape_html(run.name),
                       escape_html(run.recipe), fixed(run.active_fraction, 3));
    if (run.quality) {
      const Run::Quality& q = *run.quality;
      out += fmt::format("<td>{}</td><td>{}</td><td{}>{}</td><td>{}</td><td>{}</td><td>{} %</td>",
                         fixed(q.perplexity, 3), fixed(q.perplexity_dense, 3),
                         run.best ? " class=\"best\"" : "", fixed(q.ratio, 3),
                         q.ratio_out ? fixed(*q.ratio_out, 3) : "–", fixed(q.kl, 4),
                         fixed(100 * q.same_top, 1));
    } else {
      out += "<td>–</td><td>–</td><td>–</td><td>–</td><td>–</td><td>–</td>";
    }
    out += fmt::format("<td>{}</td></tr>\n", duration(run.seconds));
  }
  return out + "</tbody>\n</table></div>\n";
}

}  // namespace

std::string runs_page(const std::vector<Run>& runs) {
  const Colours colours = colours_of(runs);
  std::string out = fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n"
      "<title>Perplexity against active fraction</title>\n<style>{}{}</style>\n</head>\n<body>\n"
      "<main>\n<header>\n<p class=\"kicker\">moesaic runs</p>\n<h1>Perplexity against active "
      "fraction</h1>\n<p class=\"lead\">What sparsity costs: {} hybrids, each with the share of "
      "the dense MLPs' multiply-adds that it still does, router and bypass counted.</p>\n"
      "</header>\n",
      report_style(), kStyle, runs.size());
  const std::span<const Run> all(runs);
  std::size_t first = 0;
  for (int i = 0; first < runs.size() && runs[first].quality; ++i) {
    std::size_t end = first + 1;
    while (end < runs.size() && runs[end].same_group(runs[first])) ++end;
    const std::span<const Run> group = all.subspan(first, end - first);
    const std::string& text = group[0].quality->text;
    out += fmt::format(
        "<section class=\"picture\">\n<h2>{}{}</h2>\n<p>A dot is a hybrid, its height the "
        "perplexity over the dense model's. The line joins the best.</p>\n<figure>\n{}</figure>\n"
        "</section>\n<section>\n{}</section>\n",
        escape_html(group[0].dense), text.empty() ? "" : " on " + escape_html(text),
        figure(fmt::format("fig-runs-{}", i), group, colours), table(group));
    first = end;
  }
  if (first < runs.size()) {
    out += fmt::format(
        "<section>\n<h2>Not compared yet</h2>\n<p>These have a report and no comparison in the "
        "folder.</p>\n{}</section>\n",
        table(all.subspan(first)));
  }
  return out + "</main>\n</body>\n</html>\n";
}

}  // namespace moesaic::converter
