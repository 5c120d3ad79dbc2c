#include "converter/allot.h"

#include <algorithm>
#include <cmath>

#include "kernels/base/error.h"

namespace moesaic::converter {
namespace {

constexpr std::int64_t kStep = 8;  // granularity of k: eight neurons, a cache line of scores

// Fractions a layer may be given, `least` … 1.
std::vector<double> choices(double least) {
  std::vector<double> out = {least};
  for (int i = 0; i < 48; ++i) {
    const double f = i / 48.0;
    if (f > least + 1e-9 && f < 0.9) out.push_back(f);  // beyond .9 a router costs what it saves
  }
  out.push_back(1.0);
  return out;
}

}  // namespace

LayerPlan plan_for_fraction(const PlanShape& s, double fraction) {
  LayerPlan plan{false, s.n_shared, 0, s.router_rank, s.bypass_rank, s.block, s.n_clones};
  if (fraction >= 1) {
    plan = {};
    plan.dense = true;
    return plan;
  }
  const double fixed = active_fraction(plan, s.d_model, s.d_ff);
  const auto budget = static_cast<std::int64_t>(
      std::floor((fraction - fixed) * static_cast<double>(s.d_ff) + 1e-6));  // neurons
  const std::int64_t step = std::max<std::int64_t>(1, kStep / s.block);      // experts
  require<InputError>(
      budget >= step * s.block,
      "--active: a layer at {:.3f} has no room for experts beside {} shared neurons, a router of "
      "rank {} and {} experts, and a bypass of rank {}; the least is {:.3f}",
      fraction, s.n_shared, s.router_rank, n_experts(plan, s.d_ff), s.bypass_rank,
      fixed + static_cast<double>(step * s.block) / static_cast<double>(s.d_ff));
  plan.n_active = std::min(budget / (step * s.block) * step, n_experts(plan, s.d_ff));
  return plan;
}

double loss_curve(double fraction) { return std::pow(std::max(0.0, 1 - fraction), 2); }

std::vector<LayerPlan> allot(const PlanShape& shape, std::span<const double> sensitivity,
                             double active, double least) {
  const std::size_t n = sensitivity.size();
  const std::vector<double> options = choices(std::min(least, active));
  require<InputError>(n > 0 && active > 0 && active <= 1,
                      "--active: {} given, expected a fraction in (0, 1]", active);
  const double total = active * static_cast<double>(n);
  const auto cost = [&](double f) {
    return active_fraction(plan_for_fraction(shape, f), shape.d_model, shape.d_ff);
  };
  std::vector<double> costs;
  for (const double f : options) costs.push_back(cost(f));

  // Choice of each layer at price `lambda` per unit of active fraction.
  const auto choose = [&](double lambda) {
    std::vector<std::size_t> picked(n);
    for (std::size_t l = 0; l < n; ++l) {
      double best = 0;
      for (std::size_t i = 0; i < options.size(); ++i) {
        const double value =
            std::max(0.0, sensitivity[l]) * loss_curve(options[i]) + lambda * costs[i];
        if (i == 0 || value < best) {
          best = value;
          picked[l] = i;
        }
      }
    }
    return picked;
  };
  const auto sum = [&](const std::vector<std::size_t>& picked) {
    double s = 0;
    for (const std::size_t i : picked) s += costs[i];
    return s;
  };
  double low = 0;
  double high = 1;
  while (sum(choose(high)) > total && high < 1e12) high *= 2;
  for (int i = 0; i < 100; ++i) {
    const double middle = 0.5 * (low + high);
    (sum(choose(middle)) > total ? low : high) = middle;
  }
  std::vector<std::size_t> picked = choose(high);
  require<InputError>(sum(picked) <= total + 1e-9,
                      "--active: {} given, the smallest plan needs {:.3f}", active,
                      sum(picked) / static_cast<double>(n));
  // What the multiplier leaves over goes, step by step, where it helps most.
  for (;;) {
    double best = 0;
    std::size_t best_layer = n;
    const double used = sum(picked);
    for (std::size_t l = 0; l < n; ++l) {
      if (picked[l] + 1 >= options.size()) continue;
      const double extra = costs[picked[l] + 1] - costs[picked[l]];
      if (extra <= 0 || used + extra > total) continue;
      // Layers that were measured to cost nothing come last, but get what nobody else can use.
      const double gain = std::max(1e-12, sensitivity[l]) *
                          (loss_curve(options[picked[l]]) - loss_curve(options[picked[l] + 1])) /
                          extra;
      if (gain > best) {
        best = gain;
        best_layer = l;
      }
    }
    if (best_layer == n) break;
    ++picked[best_layer];
  }
  std::vector<LayerPlan> out;
  for (const std::size_t i : picked) out.push_back(plan_for_fraction(shape, options[i]));
  return out;
}

}  // namespace moesaic::converter
