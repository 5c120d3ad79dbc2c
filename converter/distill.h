#pragma once

#include <array>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

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

/// What distillation changes of a student: gate, up and down rows, bias, Q, P, and the router's V,
/// U and c.
inline constexpr std::size_t kStudentTensors = 9, kFirstStudentRouter = 6;
using StudentTensors = std::array<std::span<float>, kStudentTensors>;
StudentTensors tensors(Student& student);
std::array<std::span<const float>, kStudentTensors> tensors(const Student& student);

/// Denominators of the two losses per unit of weight: Σ ω‖y − ȳ‖² / Σ ω over the fitted rows, and
/// the same of c over the first of them, of the student as it stands.
struct LossScales {
  double y = 0, c = 0;
};
LossScales loss_scales(Context& ctx, const Student& student, const LayerSample& sample);

/// Which rows each step takes: those of a shuffled order one after the other, shuffled again where
/// less than a batch is left of it.
class BatchOrder {
 public:
  /// 0 < batch <= n_rows.
  BatchOrder(std::int64_t n_rows, std::int64_t batch, std::uint64_t seed);
  /// [batch], until the next call.
  std::span<const std::int32_t> next();

 private:
  std::vector<std::int32_t> order_;
  std::size_t batch_, next_;
  std::mt19937_64 rng_;
};

/// The learning rate's share of step `step` of `steps`.
double distill_schedule(std::int64_t step, std::int64_t steps);

/// Loss and gradients of one batch, as distill() uses them; public for the test against finite
/// differences.
struct StudentGradients {
  AlignedBuffer<float> w_gate, w_up, w_down, router_v, router_u, router_bias, bypass_q, bypass_p,
      bias;
  double output_loss = 0;     // first term of L
  double auxiliary_loss = 0;  // second, unweighted
};

void student_gradients(Context& ctx, const Student& student, ConstMatrix x, ConstMatrix y,
                       std::span<const float> weight, const LossScales& scales, double auxiliary,
                       StudentGradients& out);

/// Gradient buffers that fit a student, zero-filled.
StudentGradients make_gradients(const Student& student);
StudentTensors tensors(StudentGradients& gradients);

}  // namespace moesaic::converter
