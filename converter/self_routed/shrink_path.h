#pragma once

#include <vector>

#include "converter/self_routed/threshold_fit.h"

namespace moesaic::converter {

/// One way to spend on a layer, and what it costs the layer's output.
struct PathPoint {
  Shares shares;
  double fraction = 1;  // active_fraction(shares)
  double error = 0;     // ThresholdFit::error
};

/// From the dense layer down to an active fraction of `least`, always giving up `step` of the share
/// (input, gate or hidden) that raises the layer's output error least. Points by falling fraction;
/// the first is the dense layer. Greedy as in TEAL (arXiv 2408.14690, section 4.2), over three
/// shares within a layer. With ThresholdShape::Uniform both shares shrink together.
std::vector<PathPoint> shrink_path(ThresholdFit& fit, bool up_by_input, double least,
                                   double step = 0.05);

/// The path's point whose fraction comes closest to `fraction`.
const PathPoint& nearest(const std::vector<PathPoint>& path, double fraction);

}  // namespace moesaic::converter
