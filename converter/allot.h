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
  std::int64_t block = 1;     // LayerPlan's
  std::int64_t n_clones = 0;  // likewise
};

/// The largest plan (k a multiple of 8 neurons, or of one block where that is more) whose active
/// fraction does not exceed `fraction`; dense from the fraction on where nothing would be saved.
/// Throws InputError if not even one such step fits, naming the smallest fraction that does.
LayerPlan plan_for_fraction(const PlanShape& shape, double fraction);

/// How the loss of a converted layer is taken to fall with its active fraction f, up to a factor:
/// (1 − f)². The unexplained variance of DESIGN.md section 6 falls more slowly (exponent 1.2 to 1.4
/// between .33 and .58), but losses of layers together exceed the sum of each alone (SmolLM2 at
/// .50: about .28 nats predicted, .57 measured, with 16 layers pressed to .31), so the budget is
/// spread less than the single layers would have it.
double loss_curve(double fraction);

/// Splits a mean active fraction over layers so that Σ_l sensitivity_l · loss_curve(f_l) is
/// smallest: per layer the choice among dense and fractions in steps of 1/48 from `least` on, by a
/// Lagrange multiplier found by bisection and a greedy fill of what is left. sensitivity_l: rise of
/// the loss with layer l alone converted at one common fraction; negative counts as 0. Throws
/// InputError if `active` is below what the smallest plans need.
std::vector<LayerPlan> allot(const PlanShape& shape, std::span<const double> sensitivity,
                             double active, double least);

}  // namespace moesaic::converter
