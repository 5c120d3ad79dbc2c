#include "converter/start.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "converter/stream.h"
#include "kernels/base/error.h"
#include "tests/converter/layer_case.h"

namespace moesaic::converter {
namespace {

template <class Forward>
double error_of(const LayerSample& sample, Forward&& forward) {
  AlignedBuffer<float> out(static_cast<std::size_t>(sample.x.rows * sample.x.cols));
  const Matrix y(out.data(), sample.x.rows, sample.x.cols);
  forward(sample.x, y);
  return relative_error(sample, y);
}

double error_of(LayerCase& c, const Student& student, const LayerSample& sample) {
  return error_of(sample, [&](ConstMatrix x, Matrix y) { student_forward(c.ctx, student, x, y); });
}

// μ of the experts is subtracted by the runtime; what that leaves out belongs in the bias. Of
// clones one counts.
void add_means(Student& s, std::int64_t n_neurons) {
  const std::int64_t d = s.neurons.d_model;
  for (std::int64_t i = 0; i < n_neurons; ++i) {
    for (std::int64_t j = 0; j < d; ++j) {
      s.bias[static_cast<std::size_t>(j)] +=
          s.mean[static_cast<std::size_t>(i)] * s.neurons.down().row(i)[j];
    }
  }
}

// All neurons shared or selected: the student is the teacher, whatever its blocks.
TEST(StartFromNeurons, EveryExpertSelectedIsTheTeacher) {
  LayerCase c(400, 16, 24, kernels::Activation::Silu);
  for (const std::int64_t block : {1, 2, 4, 8, 16}) {
    SCOPED_TRACE(block);
    const LayerPlan plan{false, 8, 16 / block, 8, 0, block};
    Student s = start_from_neurons(c.ctx, c.teacher, c.sample, plan, 1e-4);
    EXPECT_EQ(s.n_experts(), 16 / block);
    EXPECT_EQ(s.router_bias.size(), static_cast<std::size_t>(16 / block));
    add_means(s, 24);
    EXPECT_LT(error_of(c, s, c.sample), 1e-9);
  }
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

// Neurons i and i + 12 fire alike, so that each expert of two has to be such a pair.
TEST(StartFromNeurons, BlocksAreOfNeuronsThatFireTogether) {
  LayerCase c(600, 16, 24, kernels::Activation::Silu);
  for (auto* rows : {&c.teacher.w_gate, &c.teacher.w_up}) {
    std::copy_n(rows->data(), 12 * 16, rows->data() + 12 * 16);
  }
  const Student s = start_from_neurons(c.ctx, c.teacher, c.sample, {false, 0, 3, 8, 0, 2}, 1e-4);
  for (std::size_t i = 0; i < 24; i += 2) {
    EXPECT_EQ(std::abs(s.origin[i] - s.origin[i + 1]), 12) << i;
  }
}

// What runs is what was fitted: the packed layer in the general form against the student's own
// masked products, some experts selected.
TEST(StartFromNeurons, PackedBlocksRunAsTheyWereFitted) {
  LayerCase c(600, 32, 48, kernels::Activation::GeluTanh);
  Student s = start_from_neurons(c.ctx, c.teacher, c.sample, {false, 8, 4, 8, 4, 4}, 1e-4);
  fit_outputs(c.ctx, s, c.sample, 1e-6, 1e-3, DType::F32);
  const PackedStudent packed = pack(s, DType::F32, DType::F32);
  const auto& mixture = std::get<models::PackedMixture>(packed);
  EXPECT_EQ(models::kind_name(mixture.kind), "glu+low_rank+none");
  EXPECT_EQ(mixture.view().block, 4);
  EXPECT_EQ(mixture.view().n_experts(), 10);
  AlignedBuffer<float> fitted(c.y.size());
  student_forward(c.ctx, s, c.sample.x, {fitted.data(), 600, 32});
  const LayerSample as_fitted{c.sample.x, {fitted.data(), 600, 32}, c.weight, 600};
  EXPECT_LT(error_of(as_fitted,
                     [&](ConstMatrix x, Matrix y) { forward_rows(c.ctx, view(packed), x, y); }),
            1e-9);
  EXPECT_GT(error_of(c, s, c.sample), 1e-3);  // not all of it is selected
  const double active = active_fraction(s.plan, 32, 48);
  EXPECT_DOUBLE_EQ(static_cast<double>(models::multiply_adds(view(packed))) / (3.0 * 32 * 48),
                   active);
}

// Whichever clone of each expert runs, as long as it is one.
TEST(StartFromNeurons, OneOfEachExpertsClonesIsTheTeacher) {
  LayerCase c(400, 16, 24, kernels::Activation::Silu);
  for (const std::int64_t block : {1, 2}) {
    const std::int64_t n_experts = 16 / block;
    for (const std::int64_t n_clones : {std::int64_t{3}, n_experts, 2 * n_experts + 5}) {
      SCOPED_TRACE(fmt::format("blocks of {}, {} clones", block, n_clones));
      const LayerPlan plan{false, 8, n_experts, 8, 0, block, n_clones};
      Student s = start_from_neurons(c.ctx, c.teacher, c.sample, plan, 1e-4);
      ASSERT_EQ(s.n_experts(), n_experts + n_clones);
      ASSERT_EQ(s.families.size(), static_cast<std::size_t>(std::min(n_experts, n_clones)));
      add_means(s, 24);
      std::fill(s.router_u.begin(), s.router_u.end(), 0.0F);
      for (std::size_t pick = 0; pick < 4; ++pick) {
        std::fill(s.router_bias.begin(), s.router_bias.end(), 1.0F);
        for (std::size_t f = 0; f < s.families.size(); ++f) {
          const auto& family = s.families[f];
          for (const std::int32_t e : family) s.router_bias[static_cast<std::size_t>(e)] = 0;
          s.router_bias[static_cast<std::size_t>(family[(pick + f) % family.size()])] = 1;
        }
        EXPECT_LT(error_of(c, s, c.sample), 1e-9);
      }
    }
  }
}

TEST(StartFromNeurons, MostImportantExpertsAreClonedFirst) {
  LayerCase c(400, 16, 24, kernels::Activation::Silu);
  const Student s =
      start_from_neurons(c.ctx, c.teacher, c.sample, {false, 8, 4, 8, 0, 1, 20}, 1e-4);
  ASSERT_EQ(s.families.size(), 16U);
  for (std::size_t f = 0; f < 16; ++f) {
    EXPECT_EQ(s.families[f].size(), f < 4 ? 3U : 2U) << f;
    EXPECT_EQ(s.families[f][0], static_cast<int>(f));
    for (const std::int32_t e : s.families[f]) {
      EXPECT_EQ(s.origin[static_cast<std::size_t>(8 + e)], s.origin[8 + f]);
    }
  }
}

// |h − μ| is large on both sides of μ, which no linear score tells: a clone for each side does.
TEST(StartFromNeurons, ClonesAnswerForOneSideEach) {
  LayerCase c(4000, 16, 32, kernels::Activation::Silu);
  const Student cloned =
      start_from_neurons(c.ctx, c.teacher, c.sample, {false, 0, 8, 16, 0, 1, 32}, 1e-4);
  AlignedBuffer<float> scores(static_cast<std::size_t>(4000 * 64));
  const Matrix m(scores.data(), 4000, 64);
  router_scores(c.ctx, cloned, c.sample.x, m);
  // Mean over families; 1: the sign of h − μ, weighted by |h − μ|, tells the winner; 0: by chance.
  double agree = 0;
  for (const auto& family : cloned.families) {
    double above = 0;
    double total = 0;
    for (std::int64_t t = 0; t < 4000; ++t) {
      const double h = LayerCase::activation(cloned.neurons, family[0], c.sample.x.row(t)) -
                       cloned.mean[static_cast<std::size_t>(family[0])];
      above += m.row(t)[family[0]] >= m.row(t)[family[1]] ? h : -h;
      total += std::abs(h);
    }
    agree += std::abs(above) / total / 32;
  }
  EXPECT_GT(agree, 0.5);
}

TEST(StartFromNeurons, PlansThatDoNotFit) {
  LayerCase c(64, 8, 24, kernels::Activation::Silu);
  for (const LayerPlan& plan :
       {LayerPlan{false, 4, 1, 8, 0, 3}, LayerPlan{false, 8, 5, 8, 0, 4},
        LayerPlan{false, 8, 20, 8, 0, 1, 3}, LayerPlan{false, 8, 4, 8, 0, 1, -1},
        LayerPlan{false, 8, 4, 8, 0, 0}}) {
    EXPECT_THROW(start_from_neurons(c.ctx, c.teacher, c.sample, plan, 1e-4), InputError);
  }
}

TEST(LeaveToWinners, OneOfEachFamily) {
  Student s;
  s.families = {{0, 3}, {1, 4, 5}};
  const float scores[6] = {1, 2, 9, 1, 5, 5};
  float c[6] = {1, 1, 1, 1, 1, 1};
  leave_to_winners(s, scores, c);
  EXPECT_EQ(std::vector<float>(c, c + 6), (std::vector<float>{1, 0, 1, 0, 1, 0}));  // ties: lower
}

TEST(Contributions, AreTheLengthOfWhatAnExpertAdds) {
  // Down rows that are orthogonal: the root of the sum of squares is the sum's length.
  Student s;
  s.plan = {.n_shared = 1, .block = 2};
  s.neurons.d_model = 4;
  s.neurons.n = 5;
  s.neurons.w_down = AlignedBuffer<float>(20);
  const float rows[5][4] = {{9, 9, 9, 9}, {3, 0, 0, 0}, {0, 4, 0, 0}, {0, 0, 1, 0}, {0, 0, 0, 2}};
  std::copy_n(&rows[0][0], 20, s.neurons.w_down.data());
  s.mean = AlignedBuffer<float>(5);
  s.mean[2] = 1;
  const float h[5] = {7, 1, 2, -3, 0.5F};
  float c[2];
  contributions(s, down_norms(s.neurons), h, c);
  EXPECT_FLOAT_EQ(c[0], 5);
  EXPECT_FLOAT_EQ(c[1], std::sqrt(10.0F));
}

}  // namespace
}  // namespace moesaic::converter
