#include "converter/study/paper_student.h"

#include <gtest/gtest.h>

#include <ostream>

#include "kernels/base/error.h"
#include "tests/converter/study/student_loops.h"

namespace moesaic::converter::study {
namespace {

struct Shaped {
  const char* name;
  StudentShape shape;  // family, d_model, n_shared, n_experts, n_active, router_rank
};

void PrintTo(const Shaped& shaped, std::ostream* out) { *out << shaped.name; }

class Passes : public testing::TestWithParam<Shaped> {
 protected:
  static constexpr std::int64_t kTokens = 19;
  static std::size_t d() { return static_cast<std::size_t>(GetParam().shape.d_model); }

  Passes() : student(random_start(GetParam().shape, std::vector<double>(d()), 3)) {
    case_.fill(x);
    case_.fill(y);
    // Away from the symmetric start: biases that are not zero, scores that differ.
    for (const auto& t : student.tensors()) {
      std::vector<float> noise(t.size());
      case_.fill(noise, 0.3F);
      for (std::size_t i = 0; i < t.size(); ++i) t[i] += noise[i];
    }
  }

  ConstMatrix inputs() const { return {x.data(), kTokens, GetParam().shape.d_model}; }
  ConstMatrix targets() const { return {y.data(), kTokens, GetParam().shape.d_model}; }

  StudyCase case_;
  PaperStudent student;
  std::vector<float> x =
      std::vector<float>(static_cast<std::size_t>(kTokens * GetParam().shape.d_model));
  std::vector<float> y = std::vector<float>(x.size());
};

TEST_P(Passes, OutputEqualsTheEquation) {
  const std::int64_t d = GetParam().shape.d_model;
  std::vector<float> out(x.size());
  predict(case_.ctx, student, inputs(), {out.data(), kTokens, d});
  const DoubleStudent loops(student);
  for (std::int64_t t = 0; t < kTokens; ++t) {
    const std::vector<double> xt(inputs().row(t), inputs().row(t) + d);
    const std::vector<double> expected = loops.output(xt);
    for (std::int64_t j = 0; j < d; ++j) {
      EXPECT_NEAR(out[static_cast<std::size_t>(t * d + j)], expected[static_cast<std::size_t>(j)],
                  1e-5)
          << t << " " << j;
    }
  }
}

// Every parameter's gradient against the slope of the double-precision loss.
TEST_P(Passes, GradientsEqualFiniteDifferences) {
  PaperStudent gradient(student.shape);
  for (const auto& t : gradient.tensors()) std::fill(t.begin(), t.end(), 7.0F);  // overwritten
  const double loss = loss_and_gradient(case_.ctx, student, inputs(), targets(), gradient);
  DoubleStudent loops(student);
  EXPECT_NEAR(loss, loops.loss(inputs(), targets()), 1e-6);
  const auto gradients = gradient.tensors();
  for (std::size_t k = 0; k < gradients.size(); ++k) {
    double scale = 0;
    for (const float g : gradients[k]) scale = std::max(scale, std::abs(static_cast<double>(g)));
    // The softmax of a single selected expert is 1 whatever its score.
    const bool idle =
        k >= 6 && k <= 8 && student.shape.n_active == 1 && student.shape.family != Family::Sgatlin;
    if (!gradients[k].empty() && !idle) {
      EXPECT_GT(scale, 1e-6) << "tensor " << k;
    }
    for (std::size_t i = 0; i < gradients[k].size(); ++i) {
      double& value = loops.tensors[k][i];
      const double kept = value;
      constexpr double kStep = 1e-6;
      value = kept + kStep;
      const double plus = loops.loss(inputs(), targets());
      value = kept - kStep;
      const double minus = loops.loss(inputs(), targets());
      value = kept;
      EXPECT_NEAR(gradients[k][i], (plus - minus) / (2 * kStep), 2e-5 * scale + 1e-8)
          << "tensor " << k << " element " << i;
    }
  }
}

TEST_P(Passes, Repeat) {
  PaperStudent one(student.shape);
  PaperStudent two(student.shape);
  EXPECT_EQ(loss_and_gradient(case_.ctx, student, inputs(), targets(), one),
            loss_and_gradient(case_.ctx, student, inputs(), targets(), two));
  const auto a = one.tensors();
  const auto b = two.tensors();
  for (std::size_t k = 0; k < a.size(); ++k) {
    EXPECT_TRUE(std::equal(a[k].begin(), a[k].end(), b[k].begin())) << k;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, Passes,
    testing::Values(Shaped{"LowRank", {Family::LowRank, 12, 3, 10, 3, 4}},
                    Shaped{"FullRank", {Family::FullRank, 12, 3, 10, 3, 0}},
                    Shaped{"Dense", {Family::Dense, 12, 5, 0, 0, 0}},
                    Shaped{"DenseOneNeuron", {Family::Dense, 12, 1, 0, 0, 0}},
                    Shaped{"AllExpertsSelected", {Family::LowRank, 12, 6, 6, 6, 4}},
                    Shaped{"OneExpertOfMany", {Family::FullRank, 9, 1, 7, 1, 0}},
                    Shaped{"RankAboveInputs", {Family::LowRank, 6, 2, 8, 2, 9}},
                    Shaped{"Peer", {Family::Peer, 12, 3, 16, 3, 4}},
                    Shaped{"PeerKBeyondTheKeys", {Family::Peer, 12, 0, 9, 7, 4}},
                    Shaped{"Sgatlin", {Family::Sgatlin, 12, 3, 16, 3, 4}},
                    Shaped{"SgatlinOneExpert", {Family::Sgatlin, 10, 2, 25, 1, 3}},
                    Shaped{"SgatlinAllExperts", {Family::Sgatlin, 10, 2, 4, 4, 11}}),
    [](const auto& info) { return info.param.name; });

// One selected expert always has the gate 1: nothing that selects it can matter.
TEST(PaperStudent, OneSelectedExpertTeachesTheRouterNothing) {
  StudyCase c;
  PaperStudent s = random_start({Family::LowRank, 8, 1, 5, 1, 3}, std::vector<double>(8), 1);
  std::vector<float> x(8 * 8);
  c.fill(x);
  PaperStudent g(s.shape);
  loss_and_gradient(c.ctx, s, {x.data(), 8, 8}, {x.data(), 8, 8}, g);
  for (const auto& t : {g.router_v.span(), g.router_u.span(), g.router_bias.span()}) {
    for (const float v : t) EXPECT_EQ(v, 0);
  }
}

// In bfloat16 the same up to its rounding (8 bits), experts that change included.
TEST(PaperStudent, Bfloat16IsClose) {
  StudyCase c;
  const PaperStudent s =
      random_start({Family::LowRank, 64, 16, 64, 16, 16}, std::vector<double>(64), 1);
  std::vector<float> x(64 * 64);
  c.fill(x);
  std::vector<float> exact(x.size());
  std::vector<float> rounded(x.size());
  predict(c.ctx, s, {x.data(), 64, 64}, {exact.data(), 64, 64});
  Context bf16{c.pool, c.workspace, c.tally, Activations::BF16};
  predict(bf16, s, {x.data(), 64, 64}, {rounded.data(), 64, 64});
  double gap = 0;
  double size = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    gap += std::pow(static_cast<double>(exact[i]) - rounded[i], 2);
    size += std::pow(static_cast<double>(exact[i]), 2);
  }
  EXPECT_GT(gap, 0);
  EXPECT_LT(gap, 1e-3 * size);
}

TEST(PaperStudent, StartIsTheProtocols) {
  const StudentShape shape = student_shape(Family::LowRank, 64, 32, 100, 16);
  EXPECT_EQ(shape, (StudentShape{Family::LowRank, 64, 16, 100, 16, 16}));
  const std::vector<double> mean(64, 1.5);
  PaperStudent s = random_start(shape, mean, 9);
  const auto expect_uniform = [](std::span<const float> values, double half) {
    double least = 1;
    double most = -1;
    double square = 0;
    for (const float v : values) {
      least = std::min<double>(least, v);
      most = std::max<double>(most, v);
      square += static_cast<double>(v) * v;
    }
    EXPECT_NEAR(least, -half, 0.05 * half);
    EXPECT_NEAR(most, half, 0.05 * half);
    EXPECT_NEAR(square / static_cast<double>(values.size()), half * half / 3, 0.1 * half * half);
  };
  expect_uniform(s.expert_in.span(), 1 / 8.0);  // 1/√d_model
  expect_uniform(s.shared_in.span(), 1 / 8.0);
  expect_uniform(s.expert_out.span(), 1 / 4.0);  // 1/√k
  expect_uniform(s.shared_out.span(), 1 / 4.0);
  expect_uniform(s.router_v.span(), 1 / 8.0);
  expect_uniform(s.router_u.span(), 1 / 4.0);  // 1/√r
  for (const auto& zero : {s.shared_bias.span(), s.expert_bias.span()}) {
    for (const float v : zero) EXPECT_EQ(v, 0);
  }
  for (const float v : s.bias) EXPECT_EQ(v, 1.5F);
  EXPECT_THROW(random_start(shape, std::vector<double>(63), 9), ShapeError);
  PaperStudent again = random_start(shape, mean, 9);
  EXPECT_TRUE(std::equal(s.expert_in.begin(), s.expert_in.end(), again.expert_in.begin()));
  PaperStudent other = random_start(shape, mean, 10);
  EXPECT_FALSE(std::equal(s.expert_in.begin(), s.expert_in.end(), other.expert_in.begin()));
}

TEST(PaperStudent, ShapesAndTheirCost) {
  EXPECT_EQ(student_shape(Family::Dense, 64, 1, 100, 16).n_shared, 1);
  EXPECT_EQ(student_shape(Family::FullRank, 64, 7, 100, 16),
            (StudentShape{Family::FullRank, 64, 4, 100, 3, 0}));
  EXPECT_EQ(student_shape(Family::FullRank, 64, 8, 4, 16).n_active, 4);  // k = n_experts
  EXPECT_EQ(multiply_adds(student_shape(Family::LowRank, 640, 16, 10000, 128)),
            2 * 640 * 16 + 8 + 128 * (640 + 10000));
  EXPECT_EQ(multiply_adds(student_shape(Family::FullRank, 640, 16, 10000, 128)),
            2 * 640 * 16 + 8 + 640 * 10000);
  EXPECT_EQ(multiply_adds(student_shape(Family::Peer, 640, 16, 10000, 128)),
            2 * 640 * 16 + 8 + 2 * 128 * (640 + 100));
  EXPECT_EQ(multiply_adds(student_shape(Family::Dense, 640, 16, 10000, 128)), 2 * 640 * 16);
  EXPECT_THROW(student_shape(Family::LowRank, 64, 1, 100, 16), InputError);
  EXPECT_THROW(student_shape(Family::LowRank, 64, 10, 4, 16), InputError);
  EXPECT_THROW(student_shape(Family::LowRank, 64, 10, 100, 0), InputError);
  EXPECT_THROW(student_shape(Family::Dense, 64, 0, 100, 16), InputError);
  EXPECT_THROW(student_shape(Family::Peer, 64, 10, 101, 16), InputError);
  EXPECT_THROW(student_shape(Family::Sgatlin, 64, 10, 100, 0), InputError);
}

TEST(PaperStudent, BatchOfOtherShapeIsRefused) {
  StudyCase c;
  const PaperStudent s = random_start({Family::Dense, 8, 2, 0, 0, 0}, std::vector<double>(8), 1);
  PaperStudent g(s.shape);
  std::vector<float> x(32);
  EXPECT_THROW(loss_and_gradient(c.ctx, s, {x.data(), 4, 7}, {x.data(), 4, 8}, g), ShapeError);
  EXPECT_THROW(loss_and_gradient(c.ctx, s, {x.data(), 4, 8}, {x.data(), 3, 8}, g), ShapeError);
}

}  // namespace
}  // namespace moesaic::converter::study
