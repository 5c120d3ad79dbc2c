#pragma once

#include <cstdint>
#include <optional>

#include "converter/student.h"
#include "converter/study/layer_data.h"
#include "engine/monitor.h"

namespace moesaic::converter::study {

/// Our own student of the same layer: started from the teacher's neurons in closed form, then
/// distilled (DESIGN.md section 2, steps 2 to 5), unweighted, float32, not packed.
struct OwnStart {
  LayerPlan plan;
  double active_fraction = 0;
  Unexplained closed_form;
  std::optional<Unexplained> distilled;  // nothing without passes
};

/// The largest plan that costs no more than `multiply_adds` per token, router and bypass counted:
/// the recipe's shares from .3 of the dense MLP on, below it smaller in proportion (ranks, shared
/// neurons), the rest selected neurons. Nothing where not one neuron is left to select, or where
/// .95 of the dense MLP is reached: that itself is then the better student.
std::optional<LayerPlan> own_plan(std::int64_t d_model, std::int64_t d_ff,
                                  std::int64_t multiply_adds);

/// Fits it on the fitted rows and judges on the held-out ones. `passes` of distillation with the
/// recipe "low-rank" otherwise; 0: closed form only. Throws Interrupted.
OwnStart own_start(Context& ctx, const Neurons& teacher, const LayerData& data,
                   const LayerPlan& plan, double passes, std::uint64_t seed,
                   engine::Monitor& monitor);

}  // namespace moesaic::converter::study
