#include "converter/adam.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace moesaic::converter {
namespace {

constexpr float kBeta1 = 0.9F;
constexpr float kBeta2 = 0.999F;

}  // namespace

AdamClock::AdamClock(std::span<const float> value, double rate, AdamUnit unit) : rate_(rate) {
  if (unit == AdamUnit::One) return;
  double square = 0;
  for (const float x : value) square += static_cast<double>(x) * x;
  // A tensor that starts at zero still has to move: its unit is then the rate itself.
  const double rms = value.empty() ? 0 : std::sqrt(square / static_cast<double>(value.size()));
  unit_ = rms > 0 ? rms : 1e-3;
}

AdamClock::Step AdamClock::count_step(double schedule) {
  ++steps_;
  return {.correction1 = static_cast<float>(1 / (1 - std::pow(kBeta1, steps_))),
          .correction2 = static_cast<float>(1 / (1 - std::pow(kBeta2, steps_))),
          .rate = static_cast<float>(rate_ * schedule * unit_)};
}

AdamTensor::AdamTensor(std::span<float> value, std::span<float> gradient, double rate,
                       AdamUnit unit)
    : clock_(value, rate, unit),
      value_(value),
      gradient_(gradient),
      m_(value.size()),
      v_(value.size()) {}

void AdamTensor::step(Context& ctx, double schedule, double gradient_scale) {
  const Step now = count_step(schedule);
  const auto scale = static_cast<float>(gradient_scale);
  const int n_threads = ctx.pool.n_threads();
  ctx.pool.run([&](int thread) {
    const Range range = split(static_cast<std::int64_t>(value_.size()), n_threads, thread, 16);
    float* value = value_.data();
    const float* gradient = gradient_.data();
    float* m = m_.data();
    float* v = v_.data();
    for (std::int64_t i = range.begin; i < range.end; ++i) {
      const float g = gradient[i] * scale;
      m[i] = kBeta1 * m[i] + (1 - kBeta1) * g;
      v[i] = kBeta2 * v[i] + (1 - kBeta2) * g * g;
      value[i] -= now.rate * (m[i] * now.correction1) / (std::sqrt(v[i] * now.correction2) + 1e-8F);
    }
  });
}

void AdamTensor::reset() {
  clock_.set_steps(0);
  std::fill(m_.begin(), m_.end(), 0.0F);
  std::fill(v_.begin(), v_.end(), 0.0F);
}

double cosine_schedule(std::int64_t step, std::int64_t steps, std::int64_t warm_up) {
  if (step < warm_up) return static_cast<double>(step + 1) / static_cast<double>(warm_up + 1);
  const double progress = static_cast<double>(step - warm_up) /
                          static_cast<double>(std::max<std::int64_t>(1, steps - warm_up));
  return 0.5 * (1 + std::cos(std::numbers::pi * progress));
}

}  // namespace moesaic::converter
