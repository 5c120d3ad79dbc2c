#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "converter/student.h"

namespace moesaic::converter {

/// Sizes that do not depend on the budget.
struct PlanShape {
  std::int64_t d_model = 0;
  std::int64_t d_ff = 0;
  std::int64_t n_shared = 0;
  std::int64_t router_rank = 0;
  std::int64_t bypass_rank = 0;
};

/// The largest plan (k a multiple of 8) whose active fraction does not exceed `fraction`; dense
/// from the fraction on where nothing would be saved. Throws InputError if not even k = 8 fits,
/// naming the smallest fraction that does.
LayerPlan plan_for_fraction(const PlanShape& shape, double fraction);

/// What one layer alone costs the model at the fractions where it was measured.
struct LossCurve {
  std::vector<double> fractions;  // ascending, below 1
  std::vector<double> losses;     // nats; negative counts as 0

  /// Linear between the points and to 0 at fraction 1; below the first point the first two's slope
  /// goes on.
  double at(double fraction) const;
};

/// Splits a mean active fraction over layers so that Σ_l curves[l].at(f_l) is smallest: per layer
/// the choice among dense and fractions in steps of 1/48 from `least` on, by a Lagrange multiplier
/// found by bisection and a greedy fill of what is left. Throws InputError if `active` is below
/// what the smallest plans need.
std::vector<LayerPlan> allot(const PlanShape& shape, std::span<const LossCurve> curves,
                             double active, double least);

}  // namespace moesaic::converter
