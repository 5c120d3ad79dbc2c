#include "converter/report_axes.h"

#include <algorithm>
#include <vector>

namespace moesaic::converter {

std::string figure_percent(double fraction) { return number(100 * fraction, 1) + " %"; }

std::string plain_value(double v) { return number(v, 4); }

double Bands::width() const {
  return kPlotWidth / static_cast<double>(std::max<std::size_t>(n, 1));
}

ValueAxis draw_value_axis(Svg& svg, double top, double bottom, double min, double max, int n_ticks,
                          std::string_view title, const std::function<std::string(double)>& label) {
  std::vector<double> ticks = nice_ticks(std::max(max, -min), n_ticks);
  const double step = ticks[1];
  while (ticks.size() > 2 && ticks[ticks.size() - 2] >= max) ticks.pop_back();
  while (ticks.front() > min) ticks.insert(ticks.begin(), ticks.front() - step);
  const ValueAxis axis{top, bottom, ticks.front(), ticks.back()};
  for (const double t : ticks) {
    svg.line(kFigureLeft, axis.y(t), kFigureWidth - kFigureRight, axis.y(t),
             std::abs(t) < step / 2 ? "axis" : "grid");
    svg.text(kFigureLeft - 8, axis.y(t) + 4, label(t), "tick end");
  }
  svg.vertical_text(13, (top + bottom) / 2, title, "axis-title");
  return axis;
}

void draw_layer_axis(Svg& svg, const Bands& bands, const ConvertReport& report, double y) {
  const std::size_t every =
      std::max<std::size_t>(1, static_cast<std::size_t>(std::ceil(20 / bands.width())));
  for (std::size_t i = 0; i < bands.n; i += every) {
    svg.text(bands.centre(i), y + 17, std::to_string(report.layers[i].layer), "tick mid");
  }
  svg.text(kFigureLeft + kPlotWidth / 2, y + 36, "layer", "axis-title mid");
}

void draw_legend(Svg& svg, std::initializer_list<LegendEntry> entries, double x) {
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

}  // namespace moesaic::converter
