#include "converter/study/figure.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "converter/svg.h"

namespace moesaic::converter::study {
namespace {

constexpr double kPanel = 300;  // width and height of a panel's axes
constexpr double kLeft = 64;    // room for a panel's value axis
constexpr double kTop = 74;
constexpr double kBottom = kTop + kPanel;
constexpr double kHeight = kBottom + 132;

constexpr const char* kStyle =
    "<style>text{font:13px sans-serif;fill:#1a1a1a}.title{font-size:16px;font-weight:bold}"
    ".note,.tick{fill:#444}.mid{text-anchor:middle}.end{text-anchor:end}.page{fill:#fff}"
    ".grid{stroke:#ddd}line.curve{stroke-width:2}.gaussian{stroke-dasharray:5 4}"
    ".low-rank{stroke:#1f6fb2;fill:#1f6fb2}.full-rank{stroke:#c2571a;fill:#c2571a}"
    ".dense{stroke:#4a4a4a;fill:#4a4a4a}circle.own{fill:none;stroke-width:1.5}</style>\n";

// What one panel shows of a cell; NaN: nothing.
using Value = std::function<double(const CellResult&)>;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

bool drawable(double v) { return std::isfinite(v) && v > 0; }

// Both axes, logarithmic, the same in all panels.
struct Axes {
  double least_neurons, most_neurons;  // log2
  double least, most;                  // log10

  double x(double left, std::int64_t neurons) const {
    const double range = std::max(1.0, most_neurons - least_neurons);
    return left + 12 +
           (std::log2(static_cast<double>(neurons)) - least_neurons) / range * (kPanel - 24);
  }
  double y(double v) const { return kBottom - (std::log10(v) - least) / (most - least) * kPanel; }
};

Axes axes_of(const StudyReport& report, const std::vector<Value>& values) {
  Axes axes{1e300, -1e300, 1e300, -1e300};
  for (const CellResult& cell : report.cells) {
    const double n = std::log2(static_cast<double>(cell.cell.n_neurons));
    axes.least_neurons = std::min(axes.least_neurons, n);
    axes.most_neurons = std::max(axes.most_neurons, n);
    for (const Value& value : values) {
      if (const double v = value(cell); drawable(v)) {
        axes.least = std::min(axes.least, std::log10(v));
        axes.most = std::max(axes.most, std::log10(v));
      }
    }
  }
  if (axes.least > axes.most) axes.least = axes.most = 0;
  axes.least = std::floor(axes.least - 1e-9);
  axes.most = std::max(axes.least + 1, std::ceil(axes.most));
  return axes;
}

void draw_axes(Svg& svg, const Axes& axes, const StudyReport& report, double left,
               std::string_view title) {
  svg.text(left + kPanel / 2, kTop - 12, title, "mid");
  for (double decade = axes.least; decade < axes.most + 0.5; ++decade) {
    for (const double step : {1.0, 2.0, 5.0}) {
      const double v = step * std::pow(10.0, decade);
      if (std::log10(v) > axes.most + 1e-9) break;
      svg.line(left, axes.y(v), left + kPanel, axes.y(v), "grid");
      svg.text(left - 6, axes.y(v) + 4, number(v, 6), "tick end");
    }
  }
  std::vector<std::int64_t> shown;
  for (const CellResult& cell : report.cells) {
    const std::int64_t n = cell.cell.n_neurons;
    if (std::find(shown.begin(), shown.end(), n) != shown.end()) continue;
    shown.push_back(n);
    svg.text(axes.x(left, n), kBottom + 18, std::to_string(n), "tick mid");
  }
  svg.text(left + kPanel / 2, kBottom + 38, "active neurons", "mid");
}

std::string css_of(const Cell& cell) {
  return fmt::format("{}{}", family_name(cell.shape.family),
                     cell.inputs == Inputs::Gaussian ? " gaussian" : "");
}

// Cells of one line follow each other in the report.
void draw_curves(Svg& svg, const Axes& axes, const StudyReport& report, double left,
                 const Value& value) {
  const CellResult* before = nullptr;
  for (const CellResult& cell : report.cells) {
    const double v = value(cell);
    if (!drawable(v)) {
      before = nullptr;
      continue;
    }
    const std::string css = css_of(cell.cell);
    if (before != nullptr && css_of(before->cell) == css) {
      svg.line(axes.x(left, before->cell.n_neurons), axes.y(value(*before)),
               axes.x(left, cell.cell.n_neurons), axes.y(v), "curve " + css);
    }
    svg.circle(
        axes.x(left, cell.cell.n_neurons), axes.y(v), 3.5, css,
        fmt::format("{}, {} inputs, {} active neurons: {}", family_name(cell.cell.shape.family),
                    inputs_name(cell.cell.inputs), cell.cell.n_neurons, number(v, 4)));
    before = &cell;
  }
}

void draw_own(Svg& svg, const Axes& axes, const StudyReport& report, double left,
              const Value& value) {
  for (const CellResult& cell : report.cells) {
    const double v = value(cell);
    if (!drawable(v)) continue;
    svg.circle(axes.x(left, cell.cell.n_neurons), axes.y(v), 5, "own " + css_of(cell.cell),
               fmt::format("our own start at {} of the dense MLP, {} inputs: {}",
                           number(cell.own->active_fraction, 4), inputs_name(cell.cell.inputs),
                           number(v, 4)));
  }
}

Value measured(double Unexplained::*part, bool real_only) {
  return [=](const CellResult& c) {
    return real_only && c.cell.inputs != Inputs::Real ? kNan : c.held_out.*part;
  };
}

Value own(double Unexplained::*part, bool real_only) {
  return [=](const CellResult& c) {
    if (!c.own || (real_only && c.cell.inputs != Inputs::Real)) return kNan;
    return c.own->distilled ? (*c.own->distilled).*part : c.own->closed_form.*part;
  };
}

}  // namespace

std::string figure_svg(const StudyReport& report) {
  const Value published = [](const CellResult& c) { return c.published.value_or(kNan); };
  const bool has_published = std::any_of(report.cells.begin(), report.cells.end(),
                                         [](const CellResult& c) { return c.published; });
  struct Panel {
    const char* title;
    Value curve, ring;
  };
  std::vector<Panel> panels = {
      {"all held-out tokens", measured(&Unexplained::all, false), own(&Unexplained::all, false)},
      {"without sinks (real inputs)", measured(&Unexplained::without_sinks, true),
       own(&Unexplained::without_sinks, true)}};
  std::vector<Value> values;
  for (const Panel& p : panels) values.insert(values.end(), {p.curve, p.ring});
  if (has_published) {
    panels.push_back(
        {"the paper's own (other data)", published, [](const CellResult&) { return kNan; }});
    values.push_back(published);
  }
  const Axes axes = axes_of(report, values);
  const double width = static_cast<double>(panels.size()) * (kPanel + kLeft) + 20;
  Svg svg("study", width, kHeight, "Variance unexplained by students of one layer",
          "Share of the MLP output's variance that students leave unexplained on held-out tokens, "
          "over the number of neurons active per token, both axes logarithmic.");
  svg.rect(0, 0, width, kHeight, "page");
  svg.text(14, 24,
           fmt::format("Variance unexplained: {} layer {}, {:g} passes, {} held-out tokens",
                       report.name, report.layer, report.options.train.passes, report.n_held_out),
           "title");
  for (std::size_t i = 0; i < panels.size(); ++i) {
    const double left = kLeft + static_cast<double>(i) * (kPanel + kLeft);
    draw_axes(svg, axes, report, left, panels[i].title);
    draw_curves(svg, axes, report, left, panels[i].curve);
    draw_own(svg, axes, report, left, panels[i].ring);
  }
  double x = kLeft;
  for (const Family family : kFamilies) {
    const std::string css(family_name(family));
    svg.line(x, kBottom + 66, x + 26, kBottom + 66, "curve " + css);
    svg.text(x + 32, kBottom + 70, css, "note");
    x += 110;
  }
  svg.line(x, kBottom + 66, x + 26, kBottom + 66, "curve dense gaussian");
  svg.text(x + 32, kBottom + 70, "Gaussian inputs", "note");
  svg.circle(kLeft + 12, kBottom + 92, 5, "own low-rank");
  svg.text(kLeft + 32, kBottom + 96,
           "our own start from the teacher's neurons at the same multiply-adds, router counted",
           "note");
  if (has_published) {
    svg.text(kLeft + 32, kBottom + 118,
             "The paper's absolute figures do not carry over: orderings and shapes are comparable.",
             "note");
  }
  // Its style makes the drawing stand alone; the one inside fills it.
  return fmt::format(
             "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0:.0f}\" height=\"{1:.0f}\" "
             "viewBox=\"0 0 {0:.0f} {1:.0f}\">\n",
             width, kHeight) +
         kStyle + svg.str() + "</svg>\n";
}

}  // namespace moesaic::converter::study
