#include "converter/fit.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "converter/rounding.h"
#include "tests/converter/layer_case.h"

namespace moesaic::converter {
namespace {

double error_of(LayerCase& c, const Student& student, const LayerSample& sample) {
  AlignedBuffer<float> out(static_cast<std::size_t>(sample.x.rows * sample.x.cols));
  const Matrix y(out.data(), sample.x.rows, sample.x.cols);
  student_forward(c.ctx, student, sample.x, y);
  return relative_error(sample, y);
}

// All neurons shared or selected: the student is the teacher.
TEST(StartFromNeurons, EveryExpertSelectedIsTheTeacher) {
  LayerCase c(400, 16, 24, kernels::Activation::Silu);
  const LayerPlan plan{false, 8, 16, 8, 0};
  Student s = start_from_neurons(c.ctx, c.teacher, c.sample, plan, 1e-4);
  // μ of the experts is subtracted by the runtime; what it leaves out belongs in the bias.
  for (std::int64_t i = 0; i < s.neurons.n; ++i) {
    for (std::int64_t j = 0; j < 16; ++j) {
      s.bias[static_cast<std::size_t>(j)] +=
          s.mean[static_cast<std::size_t>(i)] * s.neurons.down().row(i)[j];
    }
  }
  EXPECT_LT(error_of(c, s, c.sample), 1e-9);
}

TEST(StartFromNeurons, OrderIsAPermutationByImportanceAndSharedHaveNoMean) {
  LayerCase c(400, 16, 24, kernels::Activation::GeluTanh);
  // One neuron made dominant must come first.
  for (std::int64_t j = 0; j < 16; ++j)
    c.teacher.w_down[static_cast<std::size_t>(17 * 16 + j)] *= 50;
  const Student s = start_from_neurons(c.ctx, c.teacher, c.sample, {false, 4, 8, 8, 8}, 1e-4);
  EXPECT_EQ(s.origin[0], 17);
  std::vector<std::int32_t> sorted = s.origin;
  std::sort(sorted.begin(), sorted.end());
  std::vector<std::int32_t> all(24);
  std::iota(all.begin(), all.end(), 0);
  EXPECT_EQ(sorted, all);
  for (std::size_t i = 0; i < 4; ++i) EXPECT_EQ(s.mean[i], 0);
}

// At full rank, with enough data, the router's scores are the weighted least-squares fit: residuals
// are uncorrelated with the inputs and average to zero.
TEST(StartFromNeurons, FullRankRouterLeavesResidualsOrthogonalToInputs) {
  LayerCase c(600, 8, 12, kernels::Activation::Silu);
  const LayerPlan plan{false, 2, 4, 8, 0};
  const Student s = start_from_neurons(c.ctx, c.teacher, c.sample, plan, 0);
  for (std::int64_t e = 0; e < s.n_experts(); ++e) {
    std::vector<double> moment(9);
    double scale = 0;
    const std::int64_t neuron = plan.n_shared + e;
    double norm = 0;
    for (int j = 0; j < 8; ++j) norm += std::pow(s.neurons.down().row(neuron)[j], 2);
    for (std::int64_t t = 0; t < c.sample.n_fit; ++t) {
      const float* x = c.sample.x.row(t);
      double score = s.router_bias[static_cast<std::size_t>(e)];
      for (int r = 0; r < 8; ++r) {
        double z = 0;
        for (int j = 0; j < 8; ++j)
          z += static_cast<double>(s.router_v[static_cast<std::size_t>(r * 8 + j)]) * x[j];
        score += z * s.router_u[static_cast<std::size_t>(e * 8 + r)];
      }
      const double target = std::abs(LayerCase::activation(s.neurons, neuron, x) -
                                     s.mean[static_cast<std::size_t>(neuron)]) *
                            std::sqrt(norm);
      const double gap = c.weight[static_cast<std::size_t>(t)] * (target - score);
      moment[8] += gap;
      for (std::size_t j = 0; j < 8; ++j) moment[j] += gap * x[j];
      scale += c.weight[static_cast<std::size_t>(t)] * target;
    }
    for (const double m : moment) EXPECT_NEAR(m / scale, 0, 1e-4);
  }
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
