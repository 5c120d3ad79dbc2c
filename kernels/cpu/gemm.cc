#include <span>

#include "kernels/base/error.h"
#include "kernels/cpu/onednn.h"
#include "kernels/linear.h"

namespace moesaic::kernels {
namespace {

/// dst [m.rows, m.cols], rows in `range`.
void to_bf16(ConstMatrix m, Range range, std::span<std::uint16_t> dst) {
  const auto cols = static_cast<std::size_t>(m.cols);
  for (std::int64_t r = range.begin; r < range.end; ++r) {
    to_bf16_bits(m.row(r), cols, dst.data() + static_cast<std::size_t>(r) * cols);
  }
}

}  // namespace

void gemm(Context& ctx, bool trans_a, bool trans_b, float alpha, ConstMatrix a, ConstMatrix b,
          float beta, Matrix c) {
  const std::int64_t m = trans_a ? a.cols : a.rows;
  const std::int64_t k = trans_a ? a.rows : a.cols;
  const std::int64_t b_k = trans_b ? b.cols : b.rows;
  const std::int64_t n = trans_b ? b.rows : b.cols;
  require<ShapeError>(b_k == k && c.rows == m && c.cols == n,
                      "gemm: op(A) [{}, {}] by op(B) [{}, {}] into C [{}, {}], expected C [{}, {}]",
                      m, k, b_k, n, c.rows, c.cols, m, n);
  if (m == 0 || n == 0) return;
  const int n_threads = ctx.pool.n_threads();
  const bool bf16 = ctx.activations == Activations::BF16;

  // C by rows, or by columns if it is wider than high.
  const bool by_rows = m >= n;
  const Workspace::Scope scope(ctx.workspace);
  std::span<std::uint16_t> a_bits;
  std::span<std::uint16_t> b_bits;
  if (bf16) {
    a_bits = ctx.workspace.take<std::uint16_t>(static_cast<std::size_t>(a.rows * a.cols));
    b_bits = ctx.workspace.take<std::uint16_t>(static_cast<std::size_t>(b.rows * b.cols));
    ctx.pool.run([&](int thread) {
      to_bf16(a, split(a.rows, n_threads, thread), a_bits);
      to_bf16(b, split(b.rows, n_threads, thread), b_bits);
    });
  }
  ctx.pool.run([&](int thread) {
    const Range range = split(by_rows ? m : n, n_threads, thread, 16);
    if (range.size() == 0) return;
    const Range rows = by_rows ? range : Range{0, m};
    const Range cols = by_rows ? Range{0, n} : range;
    const std::int64_t lda = bf16 ? a.cols : a.stride;
    const std::int64_t ldb = bf16 ? b.cols : b.stride;
    const std::int64_t a_first = trans_a ? rows.begin : rows.begin * lda;
    const std::int64_t b_first = trans_b ? cols.begin * ldb : cols.begin;
    Matrix part(c.row(rows.begin) + cols.begin, rows.size(), cols.size(), c.stride);
    if (k == 0 || (beta != 0 && beta != 1)) {
      for (std::int64_t r = 0; r < part.rows; ++r) {
        for (std::int64_t j = 0; j < part.cols; ++j) {
          part.row(r)[j] = beta == 0 ? 0.0f : part.row(r)[j] * beta;
        }
      }
      if (k == 0) return;
    }
    const Gemm product{.trans_a = trans_a,
                       .trans_b = trans_b,
                       .m = part.rows,
                       .n = part.cols,
                       .k = k,
                       .lda = lda,
                       .ldb = ldb,
                       .ldc = c.stride,
                       .alpha = alpha,
                       .accumulate = beta != 0};
    if (bf16) {
      gemm_bf16(product, a_bits.data() + a_first, b_bits.data() + b_first, part.data);
    } else {
      gemm_f32(product, a.data + a_first, b.data + b_first, part.data);
    }
  });
}

}  // namespace moesaic::kernels
