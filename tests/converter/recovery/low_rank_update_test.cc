// A low-rank update by itself: merged against the obvious product, gradients against differences.

#include "converter/recovery/low_rank_update.h"

#include <cmath>

#include "kernels/base/error.h"
#include "tests/converter/recovery/gradient_check.h"

namespace moesaic::converter {
namespace {

constexpr std::int64_t kRows = 7, kCols = 5, kTokens = 6;

TEST(LowRankUpdate, MergedIsTheSumOfBoth) {
  Lent lent;
  RandomMatrix w(kRows, kCols, 1);
  for (const std::int64_t rank : {1, 3, 9}) {
    LowRankUpdate<Float64> update(std::as_const(w).view(), rank, 2);
    const Workspace::Scope scope(lent.ctx.workspace);
    update.refresh(lent.ctx);
    const MatrixView<double> untouched = update.take_merged(lent.ctx);
    double square = 0;
    for (std::int64_t r = 0; r < kRows; ++r) {
      for (std::int64_t c = 0; c < kCols; ++c) {
        EXPECT_EQ(untouched.row(r)[c], w.view().row(r)[c]);
        square += w.view().row(r)[c] * w.view().row(r)[c];
      }
    }
    const double s = std::sqrt(square / (kRows * kCols));
    for (std::size_t i = 0; i < update.b().size(); ++i) {
      update.b()[i] = 0.1 * static_cast<double>(i) - 1;
    }
    update.refresh(lent.ctx);
    const MatrixView<double> merged = update.take_merged(lent.ctx);
    for (std::int64_t r = 0; r < kRows; ++r) {
      for (std::int64_t c = 0; c < kCols; ++c) {
        double sum = w.view().row(r)[c];
        for (std::int64_t i = 0; i < rank; ++i) {
          sum += s * update.b()[static_cast<std::size_t>(r * rank + i)] *
                 update.a()[static_cast<std::size_t>(i * kCols + c)];
        }
        EXPECT_NEAR(merged.row(r)[c], sum, 1e-12);
      }
    }
  }
}

TEST(LowRankUpdate, GradientsAreThoseOfDifferencesAndAddUp) {
  Lent lent;
  RandomMatrix w(kRows, kCols, 1), x(kTokens, kCols, 2), dy(kTokens, kRows, 3);
  LowRankUpdate<Float64> update(std::as_const(w).view(), 3, 2);
  for (std::size_t i = 0; i < update.b().size(); ++i) {
    update.b()[i] = 0.03 * static_cast<double>(i) - 0.2;
  }
  // Σ dy ⊙ x W'ᵀ
  const auto loss = [&] {
    const Workspace::Scope scope(lent.ctx.workspace);
    update.refresh(lent.ctx);
    const MatrixView<double> merged = update.take_merged(lent.ctx);
    double sum = 0;
    for (std::int64_t t = 0; t < kTokens; ++t) {
      for (std::int64_t r = 0; r < kRows; ++r) {
        for (std::int64_t c = 0; c < kCols; ++c) {
          sum += dy.view().row(t)[r] * x.view().row(t)[c] * merged.row(r)[c];
        }
      }
    }
    return sum;
  };
  loss();
  for (const std::int64_t first : {std::int64_t{0}, kTokens / 2}) {
    update.backward(lent.ctx, std::as_const(x).view().slice(first, kTokens / 2),
                    std::as_const(dy).view().slice(first, kTokens / 2));
  }
  expect_gradient(update.a(), update.a_gradient(), loss, "A", 6, 1e-6);
  expect_gradient(update.b(), update.b_gradient(), loss, "B", 6, 1e-6);
}

TEST(LowRankUpdate, RefusesRankZero) {
  RandomMatrix w(kRows, kCols, 1);
  EXPECT_THROW(LowRankUpdate<Float64>(std::as_const(w).view(), 0, 2), ShapeError);
}

}  // namespace
}  // namespace moesaic::converter
