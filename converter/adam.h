#pragma once

#include <cstdint>
#include <span>

#include "kernels/base/aligned_buffer.h"
#include "kernels/base/context.h"

namespace moesaic::converter {

/// What one unit of learning rate is for a tensor.
enum class AdamUnit {
  RootMeanSquare,  // that of the tensor at the start, so that one rate suits tensors of any scale
  One,             // plain Adam
};

/// A tensor's steps, wherever they are taken.
class AdamClock {
 public:
  /// A tensor that starts at zero has the unit 1e-3.
  AdamClock(std::span<const float> value, double rate, AdamUnit unit = AdamUnit::RootMeanSquare);

  /// What a step takes: the corrections of both moments, 1 / (1 − βᵗ), and rate · schedule · unit.
  struct Step {
    float correction1, correction2, rate;
  };
  Step count_step(double schedule);

  std::int64_t steps() const { return steps_; }
  void set_steps(std::int64_t steps) { steps_ = steps; }

 private:
  double rate_;
  double unit_ = 1;
  std::int64_t steps_ = 0;  // since the moments were last empty
};

/// One tensor under Adam (Kingma & Ba 2015, β 0.9/0.999, ε 1e-8).
class AdamTensor {
 public:
  using Step = AdamClock::Step;

  /// Both borrowed, of one length.
  AdamTensor(std::span<float> value, std::span<float> gradient, double rate,
             AdamUnit unit = AdamUnit::RootMeanSquare);

  /// Counts a step, which the caller takes.
  Step count_step(double schedule) { return clock_.count_step(schedule); }

  /// value −= rate · schedule · unit · m̂ / (√v̂ + ε), the gradient taken times `gradient_scale`.
  void step(Context& ctx, double schedule, double gradient_scale = 1);

  /// Forgets the moments: for values that were replaced.
  void reset();

  std::span<float> value() const { return value_; }
  std::span<float> gradient() const { return gradient_; }

  // What a resumed training needs back.
  std::span<float> first_moment() { return m_.span(); }
  std::span<float> second_moment() { return v_.span(); }
  std::int64_t steps() const { return clock_.steps(); }
  void set_steps(std::int64_t steps) { clock_.set_steps(steps); }

 private:
  AdamClock clock_;
  std::span<float> value_;
  std::span<float> gradient_;
  AlignedBuffer<float> m_, v_;
};

/// Learning rate over a training, 0 to 1: linear warm-up over the first `warm_up` of `steps` steps,
/// then half a cosine down to 0.
double cosine_schedule(std::int64_t step, std::int64_t steps, std::int64_t warm_up);

}  // namespace moesaic::converter
