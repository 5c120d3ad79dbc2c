#pragma once

#include <cstdint>

#include "converter/fit.h"
#include "converter/student.h"
#include "engine/monitor.h"

namespace moesaic::converter {

/// How a layer is distilled (DESIGN.md section 2, step 5).
struct DistillOptions {
  double passes = 1;            // over the fitted rows
  std::int64_t batch = 1024;    // tokens per step
  double learning_rate = 1e-3;  // Adam; cosine to zero, linear warm-up over the first 5 %
  double router_rate = 1e-3;    // the same for router V, U and c
  double auxiliary = 1.0;       // weight of the router's regression loss beside the output loss
  std::uint64_t seed = 0;       // order of the tokens
};

/// Steps that distill() takes for n_fit fitted rows.
std::int64_t distill_steps(const DistillOptions& options, std::int64_t n_fit);

/// Trains all of a student's parameters but μ on
///   L = Σ_t ω_t ‖y_t − ŷ_t‖² / Σ_t ω_t ‖y_t − ȳ‖² + auxiliary · Σ_t ω_t ‖c_t − R(x_t)‖² / Σ_t ω_t
///   ‖c_t − c̄‖²,
/// hard top-k (no gradient through the selection), c_t of contributions() with the student's own
/// neurons at the start of each step, of clones the winner's alone (leave_to_winners), no gradient
/// into it. Adam (Kingma & Ba 2015, β 0.9/0.999,
/// ε 1e-8), each parameter's step in units of that tensor's root mean square, so that one rate
/// suits tensors of any scale. Deterministic for a seed and thread count. Throws Interrupted
/// through monitor.check().
void distill(Context& ctx, Student& student, const LayerSample& sample,
             const DistillOptions& options, engine::Monitor& monitor);

/// Loss and gradients of one batch, as distill() uses them; public for the test against finite
/// differences.
struct StudentGradients {
  AlignedBuffer<float> w_gate, w_up, w_down, router_v, router_u, router_bias, bypass_q, bypass_p,
      bias;
  double output_loss = 0;     // first term of L
  double auxiliary_loss = 0;  // second, unweighted
};

/// `y_scale` = Σ ω‖y − ȳ‖² / Σ ω and `c_scale` likewise, the denominators per unit of weight.
void student_gradients(Context& ctx, const Student& student, ConstMatrix x, ConstMatrix y,
                       std::span<const float> weight, double y_scale, double c_scale,
                       double auxiliary, StudentGradients& out);

/// Gradient buffers that fit a student, zero-filled.
StudentGradients make_gradients(const Student& student);

}  // namespace moesaic::converter
