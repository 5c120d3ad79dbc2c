#pragma once

#include <cmath>
#include <cstddef>
#include <functional>
#include <initializer_list>
#include <string>
#include <string_view>

#include "converter/convert.h"
#include "converter/svg.h"

namespace moesaic::converter {

// What the report's figures share: their frame, their axes and their legend.

inline constexpr double kFigureWidth = 760;
inline constexpr double kFigureLeft = 58;   // room for the y axis
inline constexpr double kFigureRight = 14;  // so that the last label is not cut
inline constexpr double kFigureTop = 40;    // room for the legend
inline constexpr double kPlotWidth = kFigureWidth - kFigureLeft - kFigureRight;
inline constexpr double kFigureBottom = 44;  // tick labels and axis title

inline double finite_or_zero(double v) { return std::isfinite(v) ? v : 0; }

/// "43.8 %".
std::string figure_percent(double fraction);
/// At most four decimals.
std::string plain_value(double v);

/// Columns of one chart: layer i of n has its own band.
struct Bands {
  std::size_t n;
  double width() const;
  double left(std::size_t i) const { return kFigureLeft + width() * static_cast<double>(i); }
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
                          std::string_view title, const std::function<std::string(double)>& label);

/// Layer numbers under the columns, thinned so that they do not touch.
void draw_layer_axis(Svg& svg, const Bands& bands, const ConvertReport& report, double y);

struct LegendEntry {
  std::string_view css, label;
  bool dot = false;
};
void draw_legend(Svg& svg, std::initializer_list<LegendEntry> entries, double x = kFigureLeft);

}  // namespace moesaic::converter
