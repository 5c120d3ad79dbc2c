// The backward passes of single operations, in float64 against central differences.

#include <tuple>

#include "converter/recovery/attention.h"
#include "converter/recovery/dense.h"
#include "converter/recovery/head.h"
#include "converter/recovery/norm.h"
#include "converter/recovery/rotary.h"
#include "kernels/base/error.h"
#include "tests/converter/recovery/gradient_check.h"

namespace moesaic::converter {
namespace {

using View = MatrixView<const double>;

TEST(RecoveryNorm, GradientOfInput) {
  Lent lent;
  for (const std::int64_t d : {1, 7, 32}) {
    RandomMatrix x(3, d, 1);
    RandomMatrix y(3, d, 2);
    RandomMatrix dx(3, d, 3);
    const RandomMatrix dy(3, d, 4);
    const RandomMatrix weight(1, d, 5);
    const std::span<const double> w(weight.data);
    const auto loss = [&] {
      norm_forward<double>(lent.ctx, x.view(), w, 0.1, y.view());
      return weighted_sum(dy, y);
    };
    norm_backward<double>(lent.ctx, x.view(), w, 0.1, dy.view(), false, dx.view());
    expect_gradient(x.data, dx.data, loss, "norm");
    // Added to what is there, and in the place of dy.
    RandomMatrix sum(3, d, 6);
    const RandomMatrix before = sum;
    norm_backward<double>(lent.ctx, x.view(), w, 0.1, dy.view(), true, sum.view());
    RandomMatrix same = dy;
    norm_backward<double>(lent.ctx, x.view(), w, 0.1, std::as_const(same).view(), false,
                          same.view());
    for (std::size_t i = 0; i < sum.data.size(); ++i) {
      EXPECT_DOUBLE_EQ(sum.data[i], before.data[i] + dx.data[i]);
      EXPECT_DOUBLE_EQ(same.data[i], dx.data[i]);
    }
  }
}

class RecoveryRotary : public testing::TestWithParam<kernels::RopeStyle> {};

TEST_P(RecoveryRotary, GradientIsTheInverseRotation) {
  Lent lent;
  const RotaryTable<double> table(5, 6, 100);
  RandomMatrix x(10, 12, 1);  // two windows of two heads
  const RandomMatrix dy(10, 12, 2);
  RandomMatrix dx = dy;
  rotate(lent.ctx, table, GetParam(), true, dx.view());
  const auto loss = [&] {
    RandomMatrix y = x;
    rotate(lent.ctx, table, GetParam(), false, y.view());
    return weighted_sum(dy, y);
  };
  expect_gradient(x.data, dx.data, loss, "rotary", 120);
}

// The same numbers as the kernel's, whose layouts are tested there.
TEST_P(RecoveryRotary, ForwardEqualsTheKernel) {
  Lent lent;
  const RotaryTable<float> table(7, 8, 10000);
  const auto freq = kernels::rope_frequencies(8, 10000);
  std::vector<float> x(7 * 16);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 13) - 6;
  std::vector<float> expected = x;
  const std::vector<std::int32_t> positions = {0, 1, 2, 3, 4, 5, 6};
  kernels::rope(lent.ctx, {expected.data(), 7, 16}, 8, positions, freq, GetParam());
  rotate(lent.ctx, table, GetParam(), false, Matrix(x.data(), 7, 16));
  for (std::size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(x[i], expected[i], 2e-6);
}

INSTANTIATE_TEST_SUITE_P(Styles, RecoveryRotary,
                         testing::Values(kernels::RopeStyle::Interleaved,
                                         kernels::RopeStyle::Halves),
                         [](const auto& info) {
                           return info.param == kernels::RopeStyle::Halves
                                      ? std::string("Halves")
                                      : std::string("Interleaved");
                         });

struct AttentionCase {
  const char* name;
  int n_heads, n_kv_heads, head_dim;
  std::int64_t window, n_ctx, n_windows;
};

void PrintTo(const AttentionCase& c, std::ostream* out) { *out << c.name; }

class RecoveryAttention : public testing::TestWithParam<AttentionCase> {};

TEST_P(RecoveryAttention, Gradients) {
  const AttentionCase& c = GetParam();
  Lent lent;
  const AttentionShape shape{c.n_heads, c.n_kv_heads, c.head_dim, 0.7, c.window, c.n_ctx};
  const std::int64_t m = c.n_ctx * c.n_windows;
  RandomMatrix q(m, c.n_heads * c.head_dim, 1);
  RandomMatrix k(m, c.n_kv_heads * c.head_dim, 2);
  RandomMatrix v(m, c.n_kv_heads * c.head_dim, 3);
  RandomMatrix out(m, q.cols, 4), lse(m, c.n_heads, 5);
  RandomMatrix dq(m, q.cols, 6), dk(m, k.cols, 7), dv(m, k.cols, 8);
  const RandomMatrix d_out(m, q.cols, 9);
  const auto loss = [&] {
    attention_forward<double>(lent.ctx, shape, q.view(), k.view(), v.view(), out.view(),
                              lse.view());
    return weighted_sum(d_out, out);
  };
  loss();
  attention_backward<double>(lent.ctx, shape, q.view(), k.view(), v.view(), out.view(), lse.view(),
                             d_out.view(), dq.view(), dk.view(), dv.view());
  if (c.window == 1 || c.n_ctx == 1) {  // one key: its weight is 1 whatever the scores
    for (const double g : dq.data) EXPECT_NEAR(g, 0, 1e-14);
    for (const double g : dk.data) EXPECT_NEAR(g, 0, 1e-14);
  } else {
    expect_gradient(q.data, dq.data, loss, "q", 25);
    expect_gradient(k.data, dk.data, loss, "k", 25);
  }
  expect_gradient(v.data, dv.data, loss, "v", 25);
}

// The way forward against the definition, position by position.
TEST_P(RecoveryAttention, ForwardEqualsTheFormula) {
  const AttentionCase& c = GetParam();
  Lent lent;
  const AttentionShape shape{c.n_heads, c.n_kv_heads, c.head_dim, 0.7, c.window, c.n_ctx};
  const std::int64_t m = c.n_ctx * c.n_windows;
  RandomMatrix q(m, c.n_heads * c.head_dim, 1);
  RandomMatrix k(m, c.n_kv_heads * c.head_dim, 2);
  RandomMatrix v(m, c.n_kv_heads * c.head_dim, 3);
  RandomMatrix out(m, q.cols, 4), lse(m, c.n_heads, 5);
  attention_forward<double>(lent.ctx, shape, q.view(), k.view(), v.view(), out.view(), lse.view());
  for (std::int64_t t = 0; t < m; ++t) {
    const std::int64_t start = t / c.n_ctx * c.n_ctx;
    const std::int64_t first = c.window == 0 ? start : std::max(start, t - c.window + 1);
    for (int h = 0; h < c.n_heads; ++h) {
      const int g = h / (c.n_heads / c.n_kv_heads);
      std::vector<double> expected(static_cast<std::size_t>(c.head_dim));
      double sum = 0;
      for (std::int64_t p = first; p <= t; ++p) {
        double score = 0;
        for (int i = 0; i < c.head_dim; ++i) {
          score += q.view().row(t)[h * c.head_dim + i] * k.view().row(p)[g * c.head_dim + i];
        }
        const double e = std::exp(0.7 * score);
        sum += e;
        for (int i = 0; i < c.head_dim; ++i) {
          expected[static_cast<std::size_t>(i)] += e * v.view().row(p)[g * c.head_dim + i];
        }
      }
      for (int i = 0; i < c.head_dim; ++i) {
        ASSERT_NEAR(out.view().row(t)[h * c.head_dim + i],
                    expected[static_cast<std::size_t>(i)] / sum, 1e-12);
      }
      ASSERT_NEAR(lse.view().row(t)[h], std::log(sum), 1e-12);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, RecoveryAttention,
                         testing::Values(AttentionCase{"OneToken", 2, 1, 4, 0, 1, 3},
                                         AttentionCase{"Grouped", 6, 2, 4, 0, 9, 2},
                                         AttentionCase{"ManyHeads", 3, 3, 2, 0, 5, 1},
                                         AttentionCase{"WindowOfOne", 2, 2, 4, 1, 6, 1},
                                         AttentionCase{"SlidingWindow", 4, 2, 4, 5, 12, 2},
                                         AttentionCase{"SeveralBlocks", 2, 1, 4, 0, 150, 1},
                                         AttentionCase{"SlidingOverBlocks", 2, 1, 4, 40, 270, 1}),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(RecoveryAttentionErrors, RowsThatAreNoWholeWindows) {
  Lent lent;
  RandomMatrix q(7, 4, 1), lse(7, 1, 2);
  EXPECT_THROW(attention_forward<double>(lent.ctx, {1, 1, 4, 1, 0, 5}, q.view(), q.view(), q.view(),
                                         q.view(), lse.view()),
               ShapeError);
}

class RecoveryActivation : public testing::TestWithParam<kernels::Activation> {};

TEST_P(RecoveryActivation, SlopeOfAPlainActivation) {
  RandomMatrix x(1, 50, 1, 3), value(1, 50, 2), slope(1, 50, 3);
  const RandomMatrix d(1, 50, 4);
  const auto loss = [&] {
    activation_slope(GetParam(), x.data.data(), 50, value.data.data(), slope.data.data());
    return weighted_sum(d, value);
  };
  loss();
  std::vector<double> dx(50);
  for (std::size_t i = 0; i < 50; ++i) dx[i] = d.data[i] * slope.data[i];
  expect_gradient(x.data, dx, loss, "plain", 50);
}

TEST_P(RecoveryActivation, GatedMlp) {
  Lent lent;
  DenseLayer<Float64> layer;
  layer.phi = GetParam();
  const RandomMatrix gate(11, 6, 1), up(11, 6, 2), down(6, 11, 3);
  std::copy(gate.data.begin(), gate.data.end(), layer.w_gate.reshape(11, 6).data);
  std::copy(up.data.begin(), up.data.end(), layer.w_up.reshape(11, 6).data);
  std::copy(down.data.begin(), down.data.end(), layer.w_down.reshape(6, 11).data);
  RandomMatrix x(4, 6, 4), y(4, 6, 5), dx(4, 6, 6);
  const RandomMatrix dy(4, 6, 7);
  DenseTape<Float64> tape;
  const auto loss = [&] {
    layer.forward(lent.ctx, x.view(), tape, y.view());
    return weighted_sum(dy, y);
  };
  loss();
  layer.backward(lent.ctx, dy.view(), tape, dx.view());
  expect_gradient(x.data, dx.data, loss, "x");
}

INSTANTIATE_TEST_SUITE_P(Phi, RecoveryActivation,
                         testing::Values(kernels::Activation::Silu, kernels::Activation::GeluTanh),
                         [](const auto& info) {
                           return info.param == kernels::Activation::Silu ? std::string("Silu")
                                                                          : std::string("Gelu");
                         });

TEST(RecoveryHead, DivergenceAndItsGradient) {
  Lent lent;
  const RandomMatrix head(600, 5, 1), teacher(7, 5, 2);
  RandomMatrix student(7, 5, 3), dh(7, 5, 4);
  const auto loss = [&] {
    return 0.25 * kl_head<Float64>(lent.ctx, head.view(), teacher.view(), student.view(), 0.25, {});
  };
  kl_head<Float64>(lent.ctx, head.view(), teacher.view(), student.view(), 0.25, dh.view());
  expect_gradient(student.data, dh.data, loss, "student");
  // The value by its definition.
  double expected = 0;
  for (std::int64_t t = 0; t < 7; ++t) {
    std::vector<double> p(600), q(600);
    double p_sum = 0, q_sum = 0;
    for (std::size_t v = 0; v < 600; ++v) {
      for (std::int64_t i = 0; i < 5; ++i) {
        p[v] += head.view().row(static_cast<std::int64_t>(v))[i] * teacher.view().row(t)[i];
        q[v] += head.view().row(static_cast<std::int64_t>(v))[i] *
                std::as_const(student).view().row(t)[i];
      }
      p_sum += std::exp(p[v]);
      q_sum += std::exp(q[v]);
    }
    for (std::size_t v = 0; v < 600; ++v) {
      expected += std::exp(p[v]) / p_sum * (p[v] - std::log(p_sum) - q[v] + std::log(q_sum));
    }
  }
  EXPECT_NEAR(loss(), 0.25 * expected, 1e-10);
}

TEST(RecoveryHead, EqualModelsGiveNothing) {
  Lent lent;
  const RandomMatrix head(33, 5, 1), hidden(40, 5, 2);
  RandomMatrix dh(40, 5, 3);
  EXPECT_NEAR(kl_head<Float64>(lent.ctx, head.view(), hidden.view(), hidden.view(), 1, dh.view()),
              0, 1e-12);
  for (const double g : dh.data) EXPECT_NEAR(g, 0, 1e-12);
}

// Logits far from zero: in float32 the divergence of nearly equal models keeps its digits.
TEST(RecoveryHead, LargeLogitsInFloat32) {
  Lent lent;
  std::vector<float> head(2000 * 4);
  std::vector<double> exact_head(head.size());
  for (std::size_t i = 0; i < head.size(); ++i) {
    exact_head[i] = head[i] = static_cast<float>(std::sin(static_cast<double>(i)) * 8);
  }
  const std::vector<float> p = {1, 2, -3, 1};
  const std::vector<float> q = {1.01F, 2, -3, 1.02F};
  const std::vector<double> exact_p(p.begin(), p.end());
  const std::vector<double> exact_q(q.begin(), q.end());
  const double expected = kl_head<Float64>(lent.ctx, {exact_head.data(), 2000, 4},
                                           {exact_p.data(), 1, 4}, {exact_q.data(), 1, 4}, 1, {});
  const double found =
      kl_head<Float32>(lent.ctx, {head.data(), 2000, 4}, {p.data(), 1, 4}, {q.data(), 1, 4}, 1, {});
  EXPECT_NEAR(found, expected, 1e-5);
}

}  // namespace
}  // namespace moesaic::converter
