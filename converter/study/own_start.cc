#include "converter/study/own_start.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "converter/distill.h"
#include "converter/fit.h"
#include "converter/recipe.h"
#include "converter/start.h"

namespace moesaic::converter::study {

std::optional<LayerPlan> own_plan(std::int64_t d_model, std::int64_t d_ff,
                                  std::int64_t multiply_adds) {
  const double dense = 3.0 * static_cast<double>(d_model) * static_cast<double>(d_ff);
  const double fraction = static_cast<double>(multiply_adds) / dense;
  if (fraction >= 0.95) return std::nullopt;
  const Recipe& recipe = find_recipe("low-rank");
  const double share = std::min(1.0, fraction / 0.3);
  const auto scaled = [&](double full) { return static_cast<std::int64_t>(full * share + 0.5); };
  const double most = static_cast<double>(std::max<std::int64_t>(8, d_model / 8));
  LayerPlan plan;
  plan.router_rank =
      std::max<std::int64_t>(1, scaled(std::min(most, static_cast<double>(recipe.router_rank))));
  plan.bypass_rank = scaled(std::min(most, static_cast<double>(recipe.bypass_rank)));
  plan.n_shared = scaled(recipe.shared_fraction * static_cast<double>(d_ff));
  const double fixed = active_fraction(plan, d_model, d_ff);
  plan.n_active =
      std::min(static_cast<std::int64_t>((fraction - fixed) * static_cast<double>(d_ff)),
               d_ff - plan.n_shared);
  if (plan.n_active < 1) return std::nullopt;
  return plan;
}

OwnStart own_start(Context& ctx, const Neurons& teacher, const LayerData& data,
                   const LayerPlan& plan, double passes, std::uint64_t seed,
                   engine::Monitor& monitor) {
  const Recipe& recipe = find_recipe("low-rank");
  // The teacher of the normalised outputs.
  Neurons scaled{teacher.phi,
                 teacher.d_model,
                 teacher.n,
                 AlignedBuffer<float>(teacher.w_gate.size()),
                 AlignedBuffer<float>(teacher.w_up.size()),
                 AlignedBuffer<float>(teacher.w_down.size())};
  std::copy(teacher.w_gate.begin(), teacher.w_gate.end(), scaled.w_gate.begin());
  std::copy(teacher.w_up.begin(), teacher.w_up.end(), scaled.w_up.begin());
  std::transform(teacher.w_down.begin(), teacher.w_down.end(), scaled.w_down.begin(),
                 [&](float v) { return static_cast<float>(v / data.y_scale); });

  const std::vector<float> weight(static_cast<std::size_t>(data.n_tokens()), 1.0F);
  const LayerSample sample{data.inputs(), data.outputs(), weight, data.n_fit};
  const std::int64_t first = data.n_fit + data.n_choose;
  AlignedBuffer<float> y(static_cast<std::size_t>(data.n_held_out() * data.d_model));
  const Matrix y_hat(y.data(), data.n_held_out(), data.d_model);
  const auto judged = [&](const Student& student) {
    student_forward(ctx, student, data.inputs().slice(first, data.n_held_out()), y_hat);
    return data.unexplained(first, y_hat);
  };

  OwnStart out;
  out.plan = plan;
  out.active_fraction = active_fraction(plan, teacher.d_model, teacher.n);
  Student student = start_from_neurons(ctx, scaled, sample, plan, recipe.router_ridge);
  monitor.check();
  fit_outputs(ctx, student, sample, recipe.router_ridge, recipe.output_ridge, DType::F32);
  out.closed_form = judged(student);
  DistillOptions options = recipe.distill;
  options.passes = passes;
  options.seed = seed;
  if (distill_steps(options, data.n_fit) > 0) {
    distill(ctx, student, sample, options, monitor);
    out.distilled = judged(student);
  }
  return out;
}

}  // namespace moesaic::converter::study
