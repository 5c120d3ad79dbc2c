#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "kernels/base/aligned_buffer.h"
#include "kernels/base/context.h"
#include "kernels/base/view.h"

namespace moesaic::converter {

/// Central differences of `loss` at every element of `values` (at most `n` of them, spread evenly)
/// against `gradient`, in float64: the difference is off by h² of a third derivative and by
/// rounding over h, both far below a millionth of the largest gradient.
template <class Loss>
void expect_gradient(std::span<double> values, std::span<const double> gradient, Loss&& loss,
                     const char* what, std::size_t n = 40, double h = 1e-5) {
  ASSERT_EQ(values.size(), gradient.size()) << what;
  ASSERT_FALSE(values.empty()) << what;
  double largest = 0;
  for (const double g : gradient) largest = std::max(largest, std::abs(g));
  EXPECT_GT(largest, 0) << what << ": a gradient of zeros would test nothing";
  const std::size_t step = std::max<std::size_t>(1, values.size() / n);
  for (std::size_t i = 0; i < values.size(); i += step) {
    const double at = values[i];
    values[i] = at + h;
    const double above = loss();
    values[i] = at - h;
    const double below = loss();
    values[i] = at;
    ASSERT_NEAR(gradient[i], (above - below) / (2 * h), 2e-6 * largest + 1e-10)
        << what << ", element " << i;
  }
}

/// Everything a call borrows.
struct Lent {
  ThreadPool pool{2};
  Workspace workspace;
  Tally tally;
  Context ctx{pool, workspace, tally, Activations::F32};
};

/// Normally distributed matrix of its own.
struct RandomMatrix {
  RandomMatrix(std::int64_t rows, std::int64_t cols, unsigned seed, double scale = 1)
      : data(static_cast<std::size_t>(rows * cols)), rows(rows), cols(cols) {
    std::mt19937_64 rng(seed);
    std::normal_distribution<double> normal(0, scale);
    for (double& v : data) v = normal(rng);
  }
  MatrixView<double> view() { return {data.data(), rows, cols}; }
  MatrixView<const double> view() const { return {data.data(), rows, cols}; }
  std::vector<double> data;
  std::int64_t rows, cols;
};

/// Σ a ⊙ b: a loss whose gradient with respect to b is a.
inline double weighted_sum(const RandomMatrix& a, const RandomMatrix& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.data.size(); ++i) sum += a.data[i] * b.data[i];
  return sum;
}

}  // namespace moesaic::converter
