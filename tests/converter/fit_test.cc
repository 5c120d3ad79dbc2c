#include "converter/fit.h"

#include <gtest/gtest.h>

#include "converter/rounding.h"
#include "converter/start.h"
#include "tests/converter/layer_case.h"

namespace moesaic::converter {
namespace {

double error_of(LayerCase& c, const Student& student, const LayerSample& sample) {
  AlignedBuffer<float> out(static_cast<std::size_t>(sample.x.rows * sample.x.cols));
  const Matrix y(out.data(), sample.x.rows, sample.x.cols);
  student_forward(c.ctx, student, sample.x, y);
  return relative_error(sample, y);
}

TEST(FitOutputs, NeverWorseThanTheStartAndBypassHelps) {
  LayerCase c(1500, 16, 32, kernels::Activation::Silu);
  const LayerSample fitted{c.sample.x.slice(0, c.sample.n_fit), c.sample.y.slice(0, c.sample.n_fit),
                           c.sample.weight.first(static_cast<std::size_t>(c.sample.n_fit)),
                           c.sample.n_fit};
  double last = 1e9;
  for (const std::int64_t q : {0, 2, 8}) {
    Student s = start_from_neurons(c.ctx, c.teacher, c.sample, {false, 4, 8, 8, q}, 1e-4);
    const double before = error_of(c, s, fitted);
    fit_outputs(c.ctx, s, c.sample, 1e-6, 1e-6, DType::F32);
    const double after = error_of(c, s, fitted);
    EXPECT_LT(after, before);
    EXPECT_LT(after, last) << "bypass rank " << q;
    last = after;
  }
}

// Rounded jointly with the fit: on the grid, and better than the plain rounding of the same fit.
TEST(FitOutputs, DownRowsEndOnTheGrid) {
  LayerCase c(1500, 32, 64, kernels::Activation::Silu);
  const LayerPlan plan{false, 8, 24, 8, 4};
  Student jointly = start_from_neurons(c.ctx, c.teacher, c.sample, plan, 1e-4);
  fit_outputs(c.ctx, jointly, c.sample, 1e-6, 1e-3, DType::Q4_1);
  Student plainly = start_from_neurons(c.ctx, c.teacher, c.sample, plan, 1e-4);
  fit_outputs(c.ctx, plainly, c.sample, 1e-6, 1e-3, DType::F32);
  const std::vector<float> once(jointly.neurons.w_down.begin(), jointly.neurons.w_down.end());
  round_rows({jointly.neurons.w_down.data(), 64, 32}, DType::Q4_1);
  EXPECT_EQ(std::vector<float>(jointly.neurons.w_down.begin(), jointly.neurons.w_down.end()), once);
  round_rows({plainly.neurons.w_down.data(), 64, 32}, DType::Q4_1);
  EXPECT_LT(error_of(c, jointly, c.sample), error_of(c, plainly, c.sample));
}

// The fit is a minimum: moving any fitted parameter a little does not reduce the weighted squared
// error.
TEST(FitOutputs, IsAMinimum) {
  LayerCase c(800, 8, 16, kernels::Activation::GeluTanh);
  const LayerSample fitted{c.sample.x.slice(0, c.sample.n_fit), c.sample.y.slice(0, c.sample.n_fit),
                           c.sample.weight.first(static_cast<std::size_t>(c.sample.n_fit)),
                           c.sample.n_fit};
  Student s = start_from_neurons(c.ctx, c.teacher, c.sample, {false, 2, 6, 8, 4}, 1e-4);
  fit_outputs(c.ctx, s, c.sample, 1e-6, 0, DType::F32);
  const double best = error_of(c, s, fitted);
  const auto probe = [&](AlignedBuffer<float>& values) {
    for (std::size_t i = 0; i < values.size(); i += 5) {
      const float kept = values[i];
      for (const float step : {-0.02F, 0.02F}) {
        values[i] = kept + step;
        EXPECT_GE(error_of(c, s, fitted), best - 1e-6);
      }
      values[i] = kept;
    }
  };
  probe(s.neurons.w_down);
  probe(s.bias);
  probe(s.bypass_p);
}

TEST(RelativeError, ZeroForThePerfectAndOneForTheMean) {
  LayerCase c(100, 4, 8, kernels::Activation::Silu);
  EXPECT_EQ(relative_error(c.sample, c.sample.y), 0);
  std::vector<double> mean(4);
  double total = 0;
  for (std::int64_t t = 0; t < 100; ++t) {
    total += c.weight[static_cast<std::size_t>(t)];
    for (std::size_t j = 0; j < 4; ++j)
      mean[j] += c.weight[static_cast<std::size_t>(t)] * c.sample.y.row(t)[j];
  }
  AlignedBuffer<float> out(400);
  for (std::size_t i = 0; i < 400; ++i) out[i] = static_cast<float>(mean[i % 4] / total);
  EXPECT_NEAR(relative_error(c.sample, {out.data(), 100, 4}), 1, 1e-5);
}

}  // namespace
}  // namespace moesaic::converter
