#include "converter/self_routed/threshold_fit.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/converter/layer_case.h"

namespace moesaic::converter {
namespace {

// The layer with these thresholds, neuron by neuron in double.
struct Obvious {
  std::vector<double> y;
  std::int64_t inputs = 0, routed = 0, kept = 0;
  std::vector<std::int64_t> neurons;  // that were kept
};
Obvious obvious(const Neurons& n, const Thresholds& t, const float* x) {
  Obvious out;
  std::vector<float> x_hat(x, x + n.d_model);
  for (std::size_t j = 0; j < x_hat.size(); ++j) {
    if (std::fabs(x_hat[j]) >= t.input[j]) {
      ++out.inputs;
    } else {
      x_hat[j] = 0;
    }
  }
  out.y.resize(x_hat.size());
  for (std::int64_t i = 0; i < n.n; ++i) {
    double g = 0, u = 0;
    for (std::int64_t j = 0; j < n.d_model; ++j) {
      const auto k = static_cast<std::size_t>(j);
      g += static_cast<double>(n.gate().row(i)[j]) * x_hat[k];
      u += static_cast<double>(n.up().row(i)[j]) * (t.up_by_input ? x_hat[k] : x[k]);
    }
    const double a = kernels::activate(n.phi, static_cast<float>(g));
    const auto k = static_cast<std::size_t>(i);
    if (!t.up_by_input && std::fabs(a) < t.gate[k]) continue;
    ++out.routed;
    if (std::fabs(a * u) < t.hidden[k]) continue;
    ++out.kept;
    out.neurons.push_back(i);
    for (std::size_t j = 0; j < out.y.size(); ++j) {
      out.y[j] += a * u * n.down().row(i)[static_cast<std::int64_t>(j)];
    }
  }
  return out;
}

double weighted_error(const LayerCase& c, const Thresholds& t) {
  const std::int64_t n = c.sample.x.rows, d = c.sample.x.cols;
  std::vector<double> mean(static_cast<std::size_t>(d));
  double total = 0;
  for (std::int64_t r = 0; r < n; ++r) {
    const double w = c.weight[static_cast<std::size_t>(r)];
    total += w;
    for (std::int64_t j = 0; j < d; ++j)
      mean[static_cast<std::size_t>(j)] += w * c.sample.y.row(r)[j];
  }
  double error = 0, variance = 0;
  for (std::int64_t r = 0; r < n; ++r) {
    const double w = c.weight[static_cast<std::size_t>(r)];
    const Obvious got = obvious(c.teacher, t, c.sample.x.row(r));
    for (std::int64_t j = 0; j < d; ++j) {
      const auto k = static_cast<std::size_t>(j);
      error += w * std::pow(c.sample.y.row(r)[j] - got.y[k], 2);
      variance += w * std::pow(c.sample.y.row(r)[j] - mean[k] / total, 2);
    }
  }
  return error / variance;
}

class Shapes : public testing::TestWithParam<ThresholdShape> {};

TEST_P(Shapes, SharesAndErrorAreThoseOfTheObviousLoops) {
  LayerCase c(120, 24, 80, kernels::Activation::Silu);
  ThresholdFit fit(c.ctx, c.teacher, c.sample, GetParam());
  for (const Shares& shares : {Shares{0.5, 0.6, 0.4}, Shares{0.8, 0.3, 0.25}, Shares{0.5, 0.4, 0.4},
                               Shares{0.25, 1, 0.1}}) {
    const Thresholds& t = fit.fit(shares);
    EXPECT_EQ(t.up_by_input, GetParam() == ThresholdShape::Uniform);
    std::int64_t inputs = 0, routed = 0, kept = 0;
    std::vector<std::int64_t> kept_by_neuron(80);
    for (std::int64_t r = 0; r < c.sample.x.rows; ++r) {
      const Obvious got = obvious(c.teacher, t, c.sample.x.row(r));
      for (const std::int64_t i : got.neurons) ++kept_by_neuron[static_cast<std::size_t>(i)];
      inputs += got.inputs;
      routed += got.routed;
      kept += got.kept;
    }
    const double tokens = 120;
    // Values within rounding of a threshold may fall on either side.
    EXPECT_NEAR(t.shares.input, static_cast<double>(inputs) / tokens / 24, 1e-9);
    EXPECT_NEAR(t.shares.gate, static_cast<double>(routed) / tokens / 80, 5e-4);
    EXPECT_NEAR(t.shares.hidden, static_cast<double>(kept) / tokens / 80, 5e-4);
    EXPECT_NEAR(t.shares.input, shares.input, 0.001);
    EXPECT_NEAR(t.shares.hidden, shares.hidden, 0.001);
    const std::vector<float> usage = fit.usage();
    ASSERT_EQ(usage.size(), kept_by_neuron.size());
    for (std::size_t i = 0; i < usage.size(); ++i) {
      EXPECT_NEAR(usage[i], static_cast<double>(kept_by_neuron[i]) / tokens, 1.01 / tokens) << i;
    }
    if (!t.up_by_input) {
      EXPECT_NEAR(t.shares.gate, shares.gate, 0.001);
    }
    EXPECT_NEAR(fit.error(), weighted_error(c, t), 2e-3 * weighted_error(c, t));
  }
}

TEST_P(Shapes, AllSharesLeaveTheDenseLayer) {
  LayerCase c(50, 16, 40, kernels::Activation::GeluTanh);
  ThresholdFit fit(c.ctx, c.teacher, c.sample, GetParam());
  const Thresholds& t = fit.fit({1, 1, 1});
  EXPECT_EQ(t.shares.input, 1);
  EXPECT_EQ(t.shares.gate, 1);
  EXPECT_EQ(t.shares.hidden, 1);
  EXPECT_LT(fit.error(), 1e-10);
}

TEST_P(Shapes, NoShareLeavesNothing) {
  LayerCase c(50, 16, 40, kernels::Activation::Silu);
  ThresholdFit fit(c.ctx, c.teacher, c.sample, GetParam());
  const Thresholds& t = fit.fit({0.5, 1, 0});
  EXPECT_EQ(t.shares.hidden, 0);
  EXPECT_EQ(t.hidden[3], std::numeric_limits<float>::infinity());
}

INSTANTIATE_TEST_SUITE_P(ThresholdFit, Shapes,
                         testing::Values(ThresholdShape::ByWeights, ThresholdShape::Uniform),
                         [](const auto& info) {
                           return info.param == ThresholdShape::Uniform ? "Uniform" : "ByWeights";
                         });

TEST(ThresholdFit, GoingBackToAnInputShareGivesTheSame) {
  LayerCase c(64, 16, 40, kernels::Activation::Silu);
  ThresholdFit fit(c.ctx, c.teacher, c.sample, ThresholdShape::ByWeights);
  const Thresholds first = fit.fit({0.5, 0.6, 0.4});
  const double error = fit.error();
  fit.fit({0.45, 0.6, 0.4});
  fit.fit({0.4, 0.5, 0.4});
  const Thresholds& again = fit.fit({0.5, 0.6, 0.4});
  EXPECT_EQ(again.input, first.input);
  EXPECT_EQ(again.gate, first.gate);
  EXPECT_EQ(again.hidden, first.hidden);
  EXPECT_EQ(fit.error(), error);
}

TEST(ThresholdFit, DeadNeuronsAndColumnsAreNeverRun) {
  LayerCase c(64, 16, 40, kernels::Activation::Silu);
  for (std::int64_t j = 0; j < 16; ++j) c.teacher.w_down[static_cast<std::size_t>(7 * 16 + j)] = 0;
  for (std::int64_t i = 0; i < 40; ++i) c.teacher.w_gate[static_cast<std::size_t>(i * 16 + 3)] = 0;
  ThresholdFit fit(c.ctx, c.teacher, c.sample, ThresholdShape::ByWeights);
  const Thresholds& t = fit.fit({0.9, 0.9, 0.8});
  EXPECT_EQ(t.input[3], std::numeric_limits<float>::infinity());
  EXPECT_EQ(t.gate[7], std::numeric_limits<float>::infinity());
}

TEST(ActiveFractionOfShares, CountsEveryMatrix) {
  EXPECT_DOUBLE_EQ(active_fraction(Shares{0.5, 0.6, 0.4}, false), 0.5);
  EXPECT_DOUBLE_EQ(active_fraction(Shares{0.5, 1, 0.2}, true), 0.4);
  EXPECT_DOUBLE_EQ(active_fraction(Shares{}, true), 1);
}

}  // namespace
}  // namespace moesaic::converter
