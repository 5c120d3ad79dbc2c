#include "converter/distill.h"

#include <gtest/gtest.h>

#include <random>

#include "converter/start.h"
#include "kernels/base/error.h"
#include "tests/converter/layer_case.h"

namespace moesaic::converter {
namespace {

double error_of(LayerCase& c, const Student& student) {
  const LayerSample held_out = c.sample.held_out();
  AlignedBuffer<float> out(static_cast<std::size_t>(held_out.x.rows * held_out.x.cols));
  const Matrix y(out.data(), held_out.x.rows, held_out.x.cols);
  student_forward(c.ctx, student, held_out.x, y);
  return relative_error(held_out, y);
}

// Every parameter's gradient against the slope of the loss. The auxiliary target is held fixed by
// the definition, so each term is checked for the parameters that it trains: the output loss for
// the neurons, the auxiliary for the router.
void check_gradients(kernels::Activation phi, std::int64_t block = 1, std::int64_t n_clones = 0) {
  LayerCase c(24, 8, 12, phi);
  const LayerPlan plan{false, 4, 8 / block + n_clones, 8, 4, block, n_clones};
  Student s = start_from_neurons(c.ctx, c.teacher, c.sample, plan, 1e-3);  // all selected: no jumps
  // Away from the optimum, where every slope is large against the rounding of the loss.
  std::mt19937_64 rng(3);
  std::normal_distribution<float> normal;
  for (auto* values : {&s.bypass_q, &s.bypass_p, &s.bias}) {
    for (float& v : *values) v = normal(rng);
  }
  const auto losses = [&](double auxiliary) {
    StudentGradients g = make_gradients(s);
    student_gradients(c.ctx, s, c.sample.x, c.sample.y, c.weight, {1.7, 0.9}, auxiliary, g);
    return g;
  };
  const StudentGradients g = losses(0.5);
  const auto check = [&](AlignedBuffer<float>& value, const AlignedBuffer<float>& gradient,
                         bool router) {
    ASSERT_EQ(value.size(), gradient.size());
    double scale = 0;
    for (const float v : gradient) scale = std::max(scale, std::abs(static_cast<double>(v)));
    for (std::size_t i = 0; i < value.size(); i += 3) {
      const float kept = value[i];
      const float step = 1e-3F * std::max(1.0F, std::abs(kept));
      value[i] = kept + step;
      const StudentGradients plus = losses(0);
      value[i] = kept - step;
      const StudentGradients minus = losses(0);
      value[i] = kept;
      const double slope = router ? 0.5 * (plus.auxiliary_loss - minus.auxiliary_loss) / (2 * step)
                                  : (plus.output_loss - minus.output_loss) / (2 * step);
      EXPECT_NEAR(gradient[i], slope, 1e-2 * scale + 1e-5) << i;
    }
  };
  check(s.neurons.w_gate, g.w_gate, false);
  check(s.neurons.w_up, g.w_up, false);
  check(s.neurons.w_down, g.w_down, false);
  check(s.bypass_q, g.bypass_q, false);
  check(s.bypass_p, g.bypass_p, false);
  check(s.bias, g.bias, false);
  check(s.router_v, g.router_v, true);
  check(s.router_u, g.router_u, true);
  check(s.router_bias, g.router_bias, true);
}

TEST(StudentGradients, EqualFiniteDifferencesSilu) { check_gradients(kernels::Activation::Silu); }
TEST(StudentGradients, EqualFiniteDifferencesGelu) {
  check_gradients(kernels::Activation::GeluTanh);
}
TEST(StudentGradients, EqualFiniteDifferencesBlocks) {
  check_gradients(kernels::Activation::Silu, 4);
}
TEST(StudentGradients, EqualFiniteDifferencesClones) {
  check_gradients(kernels::Activation::Silu, 1, 5);
}
TEST(StudentGradients, EqualFiniteDifferencesClonesOfBlocks) {
  check_gradients(kernels::Activation::GeluTanh, 2, 4);
}

// The router is asked for the winner's contribution and for nothing of its clones.
TEST(StudentGradients, AuxiliaryLossAsksOneOfEachFamily) {
  LayerCase c(40, 8, 12, kernels::Activation::Silu);
  const Student s = start_from_neurons(c.ctx, c.teacher, c.sample, {false, 4, 3, 8, 0, 1, 8}, 1e-3);
  StudentGradients g = make_gradients(s);
  student_gradients(c.ctx, s, c.sample.x, c.sample.y, c.weight, {1, 1}, 1, g);
  AlignedBuffer<float> scores(40 * 16);
  const Matrix m(scores.data(), 40, 16);
  router_scores(c.ctx, s, c.sample.x, m);
  const std::vector<float> norm = down_norms(s.neurons);
  double loss = 0;
  double total = 0;
  for (std::int64_t t = 0; t < 40; ++t) {
    total += c.weight[static_cast<std::size_t>(t)];
    for (std::int64_t e = 0; e < 8; ++e) {  // clone e + 8 of expert e
      const double centred = LayerCase::activation(s.neurons, 4 + e, c.sample.x.row(t)) -
                             s.mean[static_cast<std::size_t>(4 + e)];
      const double target = std::abs(centred) * norm[static_cast<std::size_t>(4 + e)];
      const double first = m.row(t)[e];
      const double second = m.row(t)[e + 8];
      const double higher = std::max(first, second);
      const double lower = std::min(first, second);
      loss += c.weight[static_cast<std::size_t>(t)] *
              ((higher - target) * (higher - target) + lower * lower);
    }
  }
  EXPECT_NEAR(g.auxiliary_loss, loss / total, 1e-4 * loss / total);
}

TEST(StudentGradients, UnselectedExpertsGetNone) {
  LayerCase c(16, 8, 12, kernels::Activation::Silu);
  Student s = start_from_neurons(c.ctx, c.teacher, c.sample, {false, 4, 0, 8, 0}, 1e-3);  // k = 0
  StudentGradients g = make_gradients(s);
  student_gradients(c.ctx, s, c.sample.x, c.sample.y, c.weight, {1, 1}, 1, g);
  for (std::size_t i = 4 * 8; i < g.w_gate.size(); ++i) {
    EXPECT_EQ(g.w_gate[i], 0);
    EXPECT_EQ(g.w_up[i], 0);
    EXPECT_EQ(g.w_down[i], 0);
  }
}

TEST(Distill, LowersTheHeldOutErrorAndRepeats) {
  const auto run = [](std::uint64_t seed, const LayerPlan& plan = {false, 8, 12, 8, 4}) {
    LayerCase c(6000, 16, 48, kernels::Activation::Silu);
    Student s = start_from_neurons(c.ctx, c.teacher, c.sample, plan, 1e-3);
    fit_outputs(c.ctx, s, c.sample, 1e-6, 1e-3, DType::F32);
    const double before = error_of(c, s);
    engine::Monitor monitor;
    DistillOptions options;
    options.passes = 6;
    options.batch = 256;
    options.learning_rate = options.router_rate = 5e-3;
    options.seed = seed;
    distill(c.ctx, s, c.sample, options, monitor);
    EXPECT_LT(error_of(c, s), before);
    return std::vector<float>(s.neurons.w_gate.begin(), s.neurons.w_gate.end());
  };
  const auto first = run(1);
  EXPECT_EQ(first, run(1));
  EXPECT_NE(first, run(2));
  run(1, {false, 8, 4, 8, 4, 4});  // blocks
  // Clones start alike and end apart.
  const auto cloned = run(1, {false, 8, 12, 8, 4, 1, 40});
  ASSERT_EQ(cloned.size(), 88U * 16U);
  double apart = 0;
  for (std::size_t i = 0; i < 40 * 16; ++i) apart += std::abs(cloned[128 + i] - cloned[768 + i]);
  EXPECT_GT(apart, 0.1);
}

TEST(Distill, StopsWhenAsked) {
  struct Stop : engine::Monitor {
    bool cancelled() const override { return true; }
  } monitor;
  LayerCase c(600, 8, 12, kernels::Activation::Silu);
  Student s = start_from_neurons(c.ctx, c.teacher, c.sample, {false, 4, 4, 8, 0}, 1e-3);
  EXPECT_THROW(distill(c.ctx, s, c.sample, {}, monitor), Interrupted);
}

TEST(Distill, NoPassesChangeNothing) {
  LayerCase c(600, 8, 12, kernels::Activation::Silu);
  Student s = start_from_neurons(c.ctx, c.teacher, c.sample, {false, 4, 4, 8, 0}, 1e-3);
  const std::vector<float> before(s.neurons.w_up.begin(), s.neurons.w_up.end());
  engine::Monitor monitor;
  distill(c.ctx, s, c.sample, {.passes = 0}, monitor);
  EXPECT_TRUE(std::equal(before.begin(), before.end(), s.neurons.w_up.begin()));
}

}  // namespace
}  // namespace moesaic::converter
