#include "converter/rounding.h"

#include <gtest/gtest.h>

#include <random>

#include "kernels/base/aligned_buffer.h"
#include "kernels/base/error.h"
#include "kernels/quant.h"

namespace moesaic::converter {
namespace {

struct Case {
  ThreadPool pool{2};
  Workspace workspace;
  Tally tally;
  Context ctx{pool, workspace, tally, Activations::F32};
  DMatrix moments;  // of correlated inputs [n, n]
  DMatrix factor;

  explicit Case(std::int64_t n) : moments(n, n) {
    std::mt19937_64 rng(7);
    std::normal_distribution<double> normal;
    DMatrix x(4 * n, n);
    for (std::int64_t t = 0; t < x.rows; ++t) {
      const double common = normal(rng);
      for (std::int64_t i = 0; i < n; ++i) x.at(t, i) = normal(rng) + 2 * common;
    }
    moments = multiply(x, true, x, false);
    factor = cholesky(moments);
  }

  static AlignedBuffer<float> random(std::int64_t n) {
    std::mt19937_64 rng(3);
    std::normal_distribution<float> normal;
    AlignedBuffer<float> out(static_cast<std::size_t>(n));
    for (float& v : out) v = normal(rng);
    return out;
  }

  // Σ of ΔᵀHΔ over the sums that Δ's coordinates belong to: Δ's rows if `by_rows`, else columns.
  double loss(ConstMatrix w, ConstMatrix q, bool by_rows) const {
    DMatrix delta(w.rows, w.cols);
    for (std::int64_t r = 0; r < w.rows; ++r) {
      for (std::int64_t c = 0; c < w.cols; ++c)
        delta.at(r, c) = static_cast<double>(w.row(r)[c]) - q.row(r)[c];
    }
    const DMatrix h =
        by_rows ? multiply(delta, false, moments, false) : multiply(moments, false, delta, false);
    double sum = 0;
    for (std::size_t i = 0; i < h.data.size(); ++i) sum += h.data[i] * delta.data[i];
    return sum;
  }
};

class Rounding : public testing::TestWithParam<DType> {};

TEST_P(Rounding, InputsLoseLessTogetherAndEndOnTheGrid) {
  Case c(96);
  const AlignedBuffer<float> w = Case::random(24 * 96);
  AlignedBuffer<float> together = Case::random(24 * 96);
  AlignedBuffer<float> alone = Case::random(24 * 96);
  const ConstMatrix mw(w.data(), 24, 96);
  const Matrix mt(together.data(), 24, 96);
  const Matrix ma(alone.data(), 24, 96);
  round_inputs(c.ctx, mt, c.factor, GetParam());
  round_rows(ma, GetParam());
  EXPECT_LT(c.loss(mw, mt, true), 0.8 * c.loss(mw, ma, true));
  const std::vector<float> once(together.begin(), together.end());
  round_rows(mt, GetParam());
  EXPECT_EQ(std::vector<float>(together.begin(), together.end()), once);
  round_inputs(c.ctx, mt, c.factor, GetParam());
  EXPECT_EQ(std::vector<float>(together.begin(), together.end()), once);
}

TEST_P(Rounding, OutputsLoseLessTogetherAndEndOnTheGrid) {
  Case c(48);
  const AlignedBuffer<float> w = Case::random(48 * 64);
  AlignedBuffer<float> together = Case::random(48 * 64);
  AlignedBuffer<float> alone = Case::random(48 * 64);
  const ConstMatrix mw(w.data(), 48, 64);
  const Matrix mt(together.data(), 48, 64);
  const Matrix ma(alone.data(), 48, 64);
  round_outputs(c.ctx, mt, c.factor, GetParam());
  round_rows(ma, GetParam());
  EXPECT_LT(c.loss(mw, mt, false), 0.8 * c.loss(mw, ma, false));
  const std::vector<float> once(together.begin(), together.end());
  round_rows(mt, GetParam());
  EXPECT_EQ(std::vector<float>(together.begin(), together.end()), once);
  round_outputs(c.ctx, mt, c.factor, GetParam());
  EXPECT_EQ(std::vector<float>(together.begin(), together.end()), once);
}

INSTANTIATE_TEST_SUITE_P(Formats, Rounding,
                         testing::Values(DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1,
                                         DType::Q8_0, DType::BF16),
                         [](const auto& info) { return std::string(traits(info.param).name); });

// By hand: H = [[4, 2], [2, 5]], the second coordinate rounded first.
TEST(Rounding, TwoCoordinatesByHand) {
  Case c(2);
  DMatrix h(2, 2);
  h.data = {4, 2, 2, 5};
  const DMatrix l = cholesky(h);
  const float w0 = 1.234567F;
  const float w1 = -0.765432F;
  const auto bf16 = [](float v) { return kernels::bf16_to_f32(kernels::f32_to_bf16(v)); };
  // Given Δ1, the best Δ0 is −(H01 / H00) Δ1.
  const float q1 = bf16(w1);
  const float q0 = bf16(w0 + (w1 - q1) * 0.5F);
  AlignedBuffer<float> column(2);
  column[0] = w0;
  column[1] = w1;
  round_outputs(c.ctx, {column.data(), 2, 1}, l, DType::BF16);
  EXPECT_EQ(column[1], q1);
  EXPECT_EQ(column[0], q0);
}

// Blocks of 32 share a scale: what the last block loses moves the first one's target by
// H_BB⁻¹ H_B,>B e before it is rounded.
TEST(Rounding, BlockBeforeARoundedOneByDirectSolution) {
  Case c(64);
  AlignedBuffer<float> w = Case::random(64);
  const std::vector<float> before(w.begin(), w.end());
  round_inputs(c.ctx, {w.data(), 1, 64}, c.factor, DType::Q4_1);

  std::vector<float> last(before.begin() + 32, before.end());
  round_rows({last.data(), 1, 32}, DType::Q4_1);
  DMatrix shift(32, 1);
  for (std::int64_t i = 0; i < 32; ++i) {
    for (std::int64_t j = 0; j < 32; ++j) {
      const auto at = static_cast<std::size_t>(j);
      shift.at(i, 0) += c.moments.at(i, 32 + j) * (static_cast<double>(before[32 + at]) - last[at]);
    }
  }
  solve_cholesky(cholesky(c.moments.block(0, 0, 32, 32)), shift);
  std::vector<float> first(32);
  for (std::size_t i = 0; i < 32; ++i) first[i] = static_cast<float>(before[i] + shift.data[i]);
  round_rows({first.data(), 1, 32}, DType::Q4_1);
  for (std::size_t i = 0; i < 32; ++i) {
    EXPECT_EQ(w[32 + i], last[i]) << i;
    EXPECT_NEAR(w[i], first[i], 1e-5) << i;
  }
}

TEST(Rounding, F32StaysAndMismatchedShapesAreNamed) {
  Case c(4);
  AlignedBuffer<float> w = Case::random(8);
  const std::vector<float> before(w.begin(), w.end());
  round_inputs(c.ctx, {w.data(), 2, 4}, c.factor, DType::F32);
  round_outputs(c.ctx, {w.data(), 4, 2}, c.factor, DType::F32);
  EXPECT_EQ(std::vector<float>(w.begin(), w.end()), before);
  EXPECT_THROW(round_inputs(c.ctx, {w.data(), 1, 8}, c.factor, DType::F32), ShapeError);
  EXPECT_THROW(round_outputs(c.ctx, {w.data(), 2, 4}, c.factor, DType::Q8_0), ShapeError);
}

}  // namespace
}  // namespace moesaic::converter
