#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "converter/linalg.h"
#include "kernels/base/aligned_buffer.h"
#include "kernels/base/context.h"
#include "kernels/base/view.h"

/// How the fits go over their rows.
namespace moesaic::converter {

// Rows that are worked on at a time: GEMMs are at full speed, and a tile of 1,536 neurons is 12 MB.
inline constexpr std::int64_t kTile = 2048;

// Rows that means, importances and the router are estimated from: a rank-64 map of 576 inputs is
// well determined by them, and the activations need not be computed twice more for the rest.
inline constexpr std::int64_t kRouterRows = 65536;

inline std::span<float> take(Context& ctx, std::int64_t n) {
  return ctx.workspace.take<float>(static_cast<std::size_t>(n));
}

inline Matrix take(Context& ctx, std::int64_t rows, std::int64_t cols) {
  return {take(ctx, rows * cols).data(), rows, cols};
}

// Calls fn(first_row, x rows) for consecutive tiles of the fitted rows, each with workspace of its
// own.
template <class Fn>
void for_tiles(Context& ctx, std::int64_t n_rows, Fn&& fn) {
  for (std::int64_t first = 0; first < n_rows; first += kTile) {
    const Workspace::Scope scope(ctx.workspace);
    fn(first, std::min(kTile, n_rows - first));
  }
}

// sums[j] += Σ_t weight[t] · f(m[t, j]), each thread its own columns, in row order.
template <class F>
void add_columns(Context& ctx, ConstMatrix m, const float* weight, std::span<double> sums, F&& f) {
  const int n_threads = ctx.pool.n_threads();
  ctx.pool.run([&](int thread) {
    const Range cols = split(m.cols, n_threads, thread, 16);
    for (std::int64_t t = 0; t < m.rows; ++t) {
      const float* row = m.row(t);
      for (std::int64_t j = cols.begin; j < cols.end; ++j) {
        sums[static_cast<std::size_t>(j)] += static_cast<double>(weight[t]) * f(row[j], j);
      }
    }
  });
}

inline DMatrix to_double(ConstMatrix m) {
  DMatrix out(m.rows, m.cols);
  for (std::int64_t r = 0; r < m.rows; ++r) std::copy_n(m.row(r), m.cols, &out.at(r, 0));
  return out;
}

inline AlignedBuffer<float> to_float(const DMatrix& m) {
  AlignedBuffer<float> out(m.data.size());
  std::transform(m.data.begin(), m.data.end(), out.begin(),
                 [](double v) { return static_cast<float>(v); });
  return out;
}

}  // namespace moesaic::converter
