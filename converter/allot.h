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

/// Share of the output's variance that a layer leaves unexplained at an active fraction, relative
/// to the others': the measured curve of DESIGN.md section 6 (SmolLM2 layer 15), linear between its
/// points, 0 at 1.
double error_curve(double fraction);

/// Splits a mean active fraction over layers so that Σ_l sensitivity_l · error_curve(f_l) is
/// smallest: per layer the choice among dense and fractions in steps of 1/48 from `least` on, by a
/// Lagrange multiplier found by bisection and a greedy fill of what is left. sensitivity_l: rise of
/// the loss with layer l alone converted at one common fraction; negative counts as 0. Throws
/// InputError if `active` is below what the smallest plans need.
std::vector<LayerPlan> allot(const PlanShape& shape, std::span<const double> sensitivity,
                             double active, double least);

}  // namespace moesaic::converter
