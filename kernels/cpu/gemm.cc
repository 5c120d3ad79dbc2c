#include <algorithm>
#include <cstring>

#include "kernels/base/error.h"
#include "kernels/cpu/onednn.h"
#include "kernels/linear.h"

namespace moesaic::kernels {
namespace {

std::uint16_t bf16_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const std::uint32_t nan = bits >> 16 | 0x40U;
  return static_cast<std::uint16_t>((bits & 0x7fffffffU) > 0x7f800000U ? nan : rounded);
}

// Packed bfloat16 copy of a matrix, made by all threads.
std::span<std::uint16_t> to_bf16(Context& ctx, ConstMatrix m) {
  const auto out = ctx.workspace.take<std::uint16_t>(static_cast<std::size_t>(m.rows * m.cols));
  const int n_threads = ctx.pool.n_threads();
  ctx.pool.run([&](int thread) {
    const Range rows = split(m.rows, n_threads, thread);
    for (std::int64_t r = rows.begin; r < rows.end; ++r) {
      std::transform(m.row(r), m.row(r) + m.cols, out.data() + r * m.cols, bf16_bits);
    }
  });
  return out;
}

}  // namespace

void gemm(Context& ctx, bool trans_a, bool trans_b, float alpha, ConstMatrix a, ConstMatrix b,
          float beta, Matrix c) {
  const std::int64_t m = trans_a ? a.cols : a.rows;
  const std::int64_t k = trans_a ? a.rows : a.cols;
  const std::int64_t n = trans_b ? b.rows : b.cols;
  require<ShapeError>(k == (trans_b ? b.cols : b.rows) && c.rows == m && c.cols == n,
                      "gemm: [{}, {}] by [{}, {}] into [{}, {}], expected [{}, {}]", m, k,
                      trans_b ? b.cols : b.rows, n, c.rows, c.cols, m, n);
  if (m == 0 || n == 0) return;
  // Without an inner size, and for a beta that oneDNN's bfloat16 product has no post-operation for,
  // C is scaled first.
  const bool bf16 = ctx.activations == Activations::BF16;
  const bool scale_first = k == 0 || (bf16 && beta != 0 && beta != 1);
  if (scale_first) {
    for (std::int64_t r = 0; r < m; ++r) {
      for (std::int64_t j = 0; j < n; ++j) c.row(r)[j] = beta == 0 ? 0 : beta * c.row(r)[j];
    }
    beta = 1;
  }
  if (k == 0) return;
  const Workspace::Scope scope(ctx.workspace);
  std::span<const std::uint16_t> a_bits;
  std::span<const std::uint16_t> b_bits;
  if (bf16) {
    a_bits = to_bf16(ctx, a);
    b_bits = a.data == b.data && a.rows == b.rows && a.cols == b.cols && a.stride == b.stride
                 ? a_bits
                 : to_bf16(ctx, b);
  }
  const int n_threads = ctx.pool.n_threads();
  ctx.pool.run([&](int thread) {
    const Range rows = split(m, n_threads, thread, 16);
    if (rows.size() == 0) return;
    const Gemm product{.trans_a = trans_a,
                       .trans_b = trans_b,
                       .m = rows.size(),
                       .n = n,
                       .k = k,
                       .lda = bf16 ? a.cols : a.stride,
                       .ldb = bf16 ? b.cols : b.stride,
                       .ldc = c.stride,
                       .alpha = alpha,
                       .beta = beta};
    const std::int64_t offset = trans_a ? rows.begin : rows.begin * product.lda;
    if (bf16) {
      gemm_bf16(product, a_bits.data() + offset, b_bits.data(), c.row(rows.begin));
    } else {
      gemm_f32(product, a.data + offset, b.data, c.row(rows.begin));
    }
  });
}

}  // namespace moesaic::kernels
