#pragma once

#include <string>

#include "converter/study/study.h"

namespace moesaic::converter::study {

/// A drawing that stands alone (SVG): variance unexplained over active neurons, both logarithmic; a
/// panel for all tokens, one without sinks, and, where there are such rows, one of the paper's own
/// figures. A line per family and kind of inputs; rings are our own start at the same cost.
std::string figure_svg(const StudyReport& report);

}  // namespace moesaic::converter::study
