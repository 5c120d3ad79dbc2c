#include "converter/self_routed/shrink_path.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace moesaic::converter {

std::vector<PathPoint> shrink_path(ThresholdFit& fit, bool up_by_input, double least, double step) {
  std::vector<PathPoint> path = {PathPoint{}};
  while (path.back().fraction > least + 1e-9) {
    const Shares at = path.back().shares;
    std::vector<Shares> moves;
    if (up_by_input) {
      moves.push_back({.input = at.input - step, .gate = 1, .hidden = at.hidden - step});
    } else {
      // Those that keep the input first: they do without its products.
      moves.push_back({at.input, at.gate, at.hidden - step});
      moves.push_back({at.input, at.gate - step, std::min(at.hidden, at.gate - step)});
      moves.push_back({at.input - step, at.gate, at.hidden});
    }
    std::erase_if(moves, [&](const Shares& s) {
      return std::min({s.input, s.gate, s.hidden}) < step / 2;
    });
    if (moves.empty()) break;
    PathPoint best;
    double best_slope = 0;
    for (std::size_t i = 0; i < moves.size(); ++i) {
      fit.fit(moves[i]);
      const PathPoint point{moves[i], active_fraction(moves[i], up_by_input), fit.error()};
      const double slope =
          (point.error - path.back().error) / (path.back().fraction - point.fraction);
      if (i == 0 || slope < best_slope) {
        best = point;
        best_slope = slope;
      }
    }
    path.push_back(best);
  }
  return path;
}

const PathPoint& nearest(const std::vector<PathPoint>& path, double fraction) {
  return *std::min_element(path.begin(), path.end(), [&](const PathPoint& a, const PathPoint& b) {
    return std::fabs(a.fraction - fraction) < std::fabs(b.fraction - fraction);
  });
}

}  // namespace moesaic::converter
