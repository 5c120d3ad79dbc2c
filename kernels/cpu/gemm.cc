#include <span>

#include "kernels/base/error.h"
#include "kernels/cpu/onednn.h"
#include "kernels/linear.h"
#include "kernels/products.h"

namespace moesaic::kernels {
namespace {

/// dst [m.rows, m.cols], rows in `range`.
void to_bf16_rows(ConstMatrix m, Range range, std::span<std::uint16_t> dst) {
  const auto cols = static_cast<std::size_t>(m.cols);
  for (std::int64_t r = range.begin; r < range.end; ++r) {
    to_bf16_bits(m.row(r), cols, dst.data() + static_cast<std::size_t>(r) * cols);
  }
}

void multiply(const Gemm& g, const float* a, const float* b, float* c) { gemm_f32(g, a, b, c); }

void multiply(const Gemm& g, const std::uint16_t* a, const std::uint16_t* b, float* c) {
  gemm_bf16(g, a, b, c);
}

/// One product and the shapes it implies.
template <class T>
struct Product {
  bool trans_a, trans_b;
  float alpha;
  MatrixView<const T> a, b;
  float beta;
  Matrix c;

  std::int64_t m() const { return trans_a ? a.cols : a.rows; }
  std::int64_t k() const { return trans_a ? a.rows : a.cols; }
  std::int64_t n() const { return trans_b ? b.rows : b.cols; }

  void check() const {
    const std::int64_t b_k = trans_b ? b.cols : b.rows;
    require<ShapeError>(
        b_k == k() && c.rows == m() && c.cols == n(),
        "gemm: op(A) [{}, {}] by op(B) [{}, {}] into C [{}, {}], expected C [{}, {}]", m(), k(),
        b_k, n(), c.rows, c.cols, m(), n());
  }

  /// The part of C in `rows` and `cols`, on the calling thread.
  void run(Range rows, Range cols) const {
    const T* a_first = a.data + (trans_a ? rows.begin : rows.begin * a.stride);
    const T* b_first = b.data + (trans_b ? cols.begin * b.stride : cols.begin);
    Matrix part(c.row(rows.begin) + cols.begin, rows.size(), cols.size(), c.stride);
    if (k() == 0 || (beta != 0 && beta != 1)) {
      for (std::int64_t r = 0; r < part.rows; ++r) {
        for (std::int64_t j = 0; j < part.cols; ++j) {
          part.row(r)[j] = beta == 0 ? 0.0f : part.row(r)[j] * beta;
        }
      }
      if (k() == 0) return;
    }
    multiply({.trans_a = trans_a,
              .trans_b = trans_b,
              .m = part.rows,
              .n = part.cols,
              .k = k(),
              .lda = a.stride,
              .ldb = b.stride,
              .ldc = c.stride,
              .alpha = alpha,
              .accumulate = beta != 0},
             a_first, b_first, part.data);
  }

  /// All of C on all threads: by rows, or by columns if it is wider than high; or elsewhere.
  void run(Context& ctx) const {
    if (m() == 0 || n() == 0) return;
    if (ctx.products != nullptr && ctx.products->takes(m(), n(), k(), sizeof(T))) {
      ctx.products->multiply(ctx, trans_a, trans_b, alpha, a, b, beta, c);
      return;
    }
    const bool by_rows = m() >= n();
    ctx.pool.run([&](int thread) {
      const Range range = split(by_rows ? m() : n(), ctx.pool.n_threads(), thread, 16);
      if (range.size() == 0) return;
      run(by_rows ? range : Range{0, m()}, by_rows ? Range{0, n()} : range);
    });
  }
};

}  // namespace

void gemm(Context& ctx, bool trans_a, bool trans_b, float alpha, ConstMatrix a, ConstMatrix b,
          float beta, Matrix c) {
  const Product<float> product{trans_a, trans_b, alpha, a, b, beta, c};
  product.check();
  if (ctx.activations != Activations::BF16) {
    product.run(ctx);
    return;
  }
  const Workspace::Scope scope(ctx.workspace);
  const auto a_bits = ctx.workspace.take<std::uint16_t>(static_cast<std::size_t>(a.rows * a.cols));
  const auto b_bits = ctx.workspace.take<std::uint16_t>(static_cast<std::size_t>(b.rows * b.cols));
  const int n_threads = ctx.pool.n_threads();
  ctx.pool.run([&](int thread) {
    to_bf16_rows(a, split(a.rows, n_threads, thread), a_bits);
    to_bf16_rows(b, split(b.rows, n_threads, thread), b_bits);
  });
  gemm(ctx, trans_a, trans_b, alpha, {a_bits.data(), a.rows, a.cols},
       {b_bits.data(), b.rows, b.cols}, beta, c);
}

void gemm(Context& ctx, bool trans_a, bool trans_b, float alpha, MatrixView<const std::uint16_t> a,
          MatrixView<const std::uint16_t> b, float beta, Matrix c) {
  const Product<std::uint16_t> product{trans_a, trans_b, alpha, a, b, beta, c};
  product.check();
  product.run(ctx);
}

void gemm_on_this_thread(bool trans_a, bool trans_b, float alpha, ConstMatrix a, ConstMatrix b,
                         float beta, Matrix c) {
  const Product<float> product{trans_a, trans_b, alpha, a, b, beta, c};
  product.check();
  if (c.rows > 0 && c.cols > 0) product.run({0, c.rows}, {0, c.cols});
}

void to_bf16(std::span<const float> src, std::span<std::uint16_t> dst) {
  require<ShapeError>(src.size() == dst.size(), "to_bf16: {} elements into {}", src.size(),
                      dst.size());
  to_bf16_bits(src.data(), src.size(), dst.data());
}

}  // namespace moesaic::kernels
