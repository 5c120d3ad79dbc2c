#include "converter/recovery/moments.h"

#include <algorithm>
#include <cmath>

namespace moesaic::converter {

MatrixView<const std::uint16_t> take_weighted(Context& ctx, MatrixView<const std::uint16_t> a,
                                              std::span<const float> weight, bool intercept) {
  const std::int64_t cols = a.cols + (intercept ? 1 : 0);
  const auto out = take_matrix<std::uint16_t>(ctx, a.rows, cols);
  const auto scratch = take_matrix<float>(ctx, ctx.pool.n_threads(), cols);
  for_each_row(ctx, a.rows, [&](std::int64_t t, int thread) {
    const float root = std::sqrt(weight[static_cast<std::size_t>(t)]);
    float* row = scratch.row(thread);
    from_operand(a.row(t), a.cols, row);
    for (std::int64_t i = 0; i < a.cols; ++i) row[i] *= root;
    if (intercept) row[a.cols] = root;
    to_operand(row, cols, out.row(t));
  });
  return out;
}

DMatrix moment_factor(const AlignedBuffer<float>& moments, std::int64_t n) {
  DMatrix sum(n, n);
  std::copy(moments.begin(), moments.end(), sum.data.begin());
  double trace = 0;
  for (std::int64_t i = 0; i < n; ++i) trace += sum.at(i, i);
  for (std::int64_t i = 0; i < n; ++i) {
    sum.at(i, i) += 0.01 * trace / static_cast<double>(n) + 1e-30;
  }
  return cholesky(std::move(sum));
}

}  // namespace moesaic::converter
