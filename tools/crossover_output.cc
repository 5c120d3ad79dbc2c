#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "converter/svg.h"
#include "tools/crossover.h"
#include "tools/statistics.h"

namespace moesaic::tools {
namespace {

constexpr double kWidth = 760;
constexpr double kLeft = 64;  // room for batch sizes and the axis title
constexpr double kRight = 16;
constexpr double kTop = 78;     // room for title and two lines under it
constexpr double kRow = 40;     // height of a row of cells
constexpr double kLegend = 50;  // from the x axis' title to the legend's boxes
constexpr double kPlotWidth = kWidth - kLeft - kRight;

/// One colour for ratios below `below` (and not below that of the step before).
struct Step {
  double below;
  std::string_view label, colour;
};
// Blue where sparse is faster, orange where dense is: told apart by the colour-blind too, and pale
// enough for dark numbers.
constexpr std::array<Step, 7> kSteps = {{{0.67, "< 0.67", "#e08a3c"},
                                         {0.8, "0.67–0.8", "#efb27c"},
                                         {0.95, "0.8–0.95", "#f8d9bd"},
                                         {1.05, "0.95–1.05", "#f1f1f1"},
                                         {1.25, "1.05–1.25", "#cfe1f2"},
                                         {1.5, "1.25–1.5", "#9dc3e6"},
                                         {1e300, "≥ 1.5", "#69a3d8"}}};

std::string step_class(double ratio) {
  std::size_t i = 0;
  while (i + 1 < kSteps.size() && ratio >= kSteps[i].below) ++i;
  return fmt::format("s{}", i);
}

std::string style() {
  std::string css =
      "text{font:13px sans-serif;fill:#1a1a1a}.title{font-size:16px;font-weight:bold}"
      ".note,.tick{fill:#444}.cell{font-weight:600}.mid{text-anchor:middle}.end{text-anchor:end}"
      ".page{fill:#fff}.even{stroke:#111;stroke-width:3;stroke-linecap:square}rect{stroke:#fff}"
      "rect.behind{stroke:none}";
  for (std::size_t i = 0; i < kSteps.size(); ++i) {
    css += fmt::format(".s{}{{fill:{}}}", i, kSteps[i].colour);
  }
  return "<style>" + css + "</style>\n";
}

std::string how(const Crossover& result) {
  const CrossoverSettings& s = result.settings;
  return fmt::format("{}, {} thread{}, {} activations; median of {} paired runs of {} passes",
                     result.cpu, result.threads, result.threads == 1 ? "" : "s", result.activations,
                     s.repetitions, s.n_gen) +
         (s.depth > 0 ? fmt::format(" at depth {}", s.depth) : "");
}

/// Where a fraction lies between the columns' centres.
double x_of(const Crossover& result, double fraction, double column) {
  const std::vector<double>& f = result.fractions;
  std::size_t i = 0;
  while (i + 2 < f.size() && fraction > f[i + 1]) ++i;
  const double share = f.size() < 2 ? 0 : (fraction - f[i]) / (f[i + 1] - f[i]);
  return kLeft + column * (static_cast<double>(i) + 0.5 + share);
}

}  // namespace

Json crossover_json(const Crossover& result) {
  Json points = Json::array();
  Json break_even = Json::array();
  for (std::size_t b = 0; b < result.settings.batches.size(); ++b) {
    const std::int64_t batch = result.settings.batches[b];
    for (std::size_t f = 0; f < result.fractions.size(); ++f) {
      const CrossoverPoint& point = result.points[b][f];
      points.push_back({{"batch", batch},
                        {"active_fraction", result.fractions[f]},
                        {"ratio", point.ratio()},
                        {"ratio_min", point.lowest()},
                        {"ratio_max", point.highest()},
                        {"dense_ts", median(point.dense_tps)},
                        {"hybrid_ts", median(point.hybrid_tps)},
                        {"dense_samples_ts", point.dense_tps},
                        {"hybrid_samples_ts", point.hybrid_tps}});
    }
    const std::optional<double> fraction = result.break_even(b);
    break_even.push_back(
        {{"batch", batch}, {"active_fraction", fraction ? Json(*fraction) : Json()}});
  }
  return {{"dense", result.dense},
          {"hybrid", result.hybrid},
          {"cpu_info", result.cpu},
          {"n_threads", result.threads},
          {"activations", result.activations},
          {"n_gen", result.settings.n_gen},
          {"n_depth", result.settings.depth},
          {"repetitions", result.settings.repetitions},
          {"batches", result.settings.batches},
          {"active_fractions", result.fractions},
          {"points", points},
          {"break_even", break_even}};
}

std::string crossover_table(const Crossover& result) {
  std::vector<std::vector<std::string>> rows = {{"batch"}};
  for (const double fraction : result.fractions) rows[0].push_back(fmt::format("{:.3f}", fraction));
  rows[0].push_back("break-even");
  for (std::size_t b = 0; b < result.settings.batches.size(); ++b) {
    std::vector<std::string>& row = rows.emplace_back();
    row.push_back(std::to_string(result.settings.batches[b]));
    for (const CrossoverPoint& point : result.points[b]) {
      row.push_back(fmt::format("{:.2f}", point.ratio()));
    }
    const std::optional<double> fraction = result.break_even(b);
    row.push_back(!fraction       ? "ahead"
                  : *fraction > 0 ? fmt::format("{:.3f}", *fraction)
                                  : "behind");
  }
  return fmt::format(
      "{}\nHybrid tokens/s over dense, decoding `batch` sequences together; columns: mean active "
      "fraction of the\nMLPs. Break-even: the fraction from which on dense is faster.\n"
      "Dense {}; hybrid {}.\n{}.\n",
      markdown_table(rows), result.dense, result.hybrid, how(result));
}

std::string crossover_svg(const Crossover& result) {
  const std::size_t n_rows = result.settings.batches.size();
  const double column = kPlotWidth / static_cast<double>(result.fractions.size());
  const double bottom = kTop + kRow * static_cast<double>(n_rows);
  const double height = bottom + kLegend + 56;
  converter::Svg svg("crossover", kWidth, height, "Where sparse stops paying",
                     "Decode speed of the hybrid over that of the dense model, by batch size and "
                     "active fraction of the MLPs");
  svg.rect(0, 0, kWidth, height, "page");
  svg.text(kLeft, 24, "Where sparse stops paying: decode speed, hybrid over dense", "title");
  svg.text(kLeft, 45, fmt::format("{}  over  {}", result.hybrid, result.dense), "note");
  svg.text(kLeft, 63, how(result), "note");

  for (std::size_t b = 0; b < n_rows; ++b) {
    const double y = kTop + kRow * static_cast<double>(b);
    svg.text(kLeft - 8, y + kRow / 2 + 4, std::to_string(result.settings.batches[b]), "tick end");
    for (std::size_t f = 0; f < result.fractions.size(); ++f) {
      const CrossoverPoint& point = result.points[b][f];
      svg.rect(
          kLeft + column * static_cast<double>(f), y, column, kRow, step_class(point.ratio()),
          fmt::format("batch {}, active fraction {:.3f}: {:.1f} over {:.1f} tokens/s, ratio "
                      "{:.3f} ({:.3f} to {:.3f})",
                      result.settings.batches[b], result.fractions[f], median(point.hybrid_tps),
                      median(point.dense_tps), point.ratio(), point.lowest(), point.highest()));
    }
  }
  // The border, one step a row: at an edge where one of the two is ahead at every fraction.
  double previous = 0;
  for (std::size_t b = 0; b < n_rows; ++b) {
    const double y = kTop + kRow * static_cast<double>(b);
    const std::optional<double> fraction = result.break_even(b);
    const double x = !fraction        ? kLeft + kPlotWidth
                     : *fraction == 0 ? kLeft
                                      : x_of(result, *fraction, column);
    if (b > 0) svg.line(previous, y, x, y, "even");
    svg.line(x, y, x, y + kRow, "even");
    previous = x;
  }
  for (std::size_t b = 0; b < n_rows; ++b) {
    const double y = kTop + kRow * static_cast<double>(b);
    for (std::size_t f = 0; f < result.fractions.size(); ++f) {
      const double x = kLeft + column * (static_cast<double>(f) + 0.5);
      const double ratio = result.points[b][f].ratio();
      // The border passes behind the number.
      svg.rect(x - 18, y + kRow / 2 - 10, 36, 20, step_class(ratio) + " behind");
      svg.text(x, y + kRow / 2 + 4, fmt::format("{:.2f}", ratio), "cell mid");
    }
  }
  for (std::size_t f = 0; f < result.fractions.size(); ++f) {
    svg.text(kLeft + column * (static_cast<double>(f) + 0.5), bottom + 18,
             fmt::format("{:.2f}", result.fractions[f]), "tick mid");
  }
  svg.text(kLeft + kPlotWidth / 2, bottom + 37,
           "active fraction of the MLPs (mean over layers, router and bypass counted)", "mid");
  svg.vertical_text(16, (kTop + bottom) / 2, "sequences decoded together", "");

  constexpr double kBox = 88;
  const double y = bottom + kLegend + 8;
  for (std::size_t i = 0; i < kSteps.size(); ++i) {
    const double x = kLeft + kBox * static_cast<double>(i);
    svg.rect(x, y, kBox, 14, fmt::format("s{}", i));
    svg.text(x + kBox / 2, y + 31, kSteps[i].label, "tick mid");
  }
  svg.line(kLeft + 7 * kBox + 16, y + 1, kLeft + 7 * kBox + 16, y + 13, "even");
  svg.text(kLeft + 7 * kBox + 22, y + 12, "even", "tick");
  // Its style makes the drawing stand alone; the one inside fills it.
  return fmt::format(
             "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0:.0f}\" height=\"{1:.0f}\" "
             "viewBox=\"0 0 {0:.0f} {1:.0f}\">\n",
             kWidth, height) +
         style() + svg.str() + "</svg>\n";
}

}  // namespace moesaic::tools
