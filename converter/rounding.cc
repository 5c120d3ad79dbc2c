#include "converter/rounding.h"

#include <algorithm>
#include <vector>

#include "kernels/base/aligned_buffer.h"
#include "kernels/base/error.h"
#include "kernels/linear.h"
#include "kernels/quant.h"

namespace moesaic::converter {
namespace {

// Weights that share a scale in `dtype`, or, where none do, as many as are rounded at once.
std::int64_t block_length(DType dtype, std::int64_t n) {
  const std::int64_t block = traits(dtype).block_elems;
  return block > 1 ? block : std::min<std::int64_t>(n, 32);
}

void round_span(DType dtype, std::span<float> values, std::span<std::byte> packed) {
  kernels::quantize_row(dtype, values, packed.data());
  kernels::dequantize_row(dtype, packed.data(), values);
}

void check(Matrix w, std::int64_t n, const DMatrix& l, DType dtype) {
  require<ShapeError>(l.rows == l.cols && l.rows >= n,
                      "rounding: {} coordinates with a factor of [{}, {}]", n, l.rows, l.cols);
  require<ShapeError>(w.cols % traits(dtype).block_elems == 0,
                      "rounding: rows of {} to {}, expected a multiple of {}", w.cols,
                      traits(dtype).name, traits(dtype).block_elems);
}

// share[j, k] for a block B of k's and j behind it: row j of L_{>B,B} L_BB⁻¹.
AlignedBuffer<float> shares_of_lost(const DMatrix& l, std::int64_t n, std::int64_t length) {
  AlignedBuffer<float> shares(static_cast<std::size_t>(n * n));
  std::vector<double> share(static_cast<std::size_t>(length));
  for (std::int64_t first = 0; first < n; first += length) {
    const std::int64_t end = std::min(n, first + length);
    for (std::int64_t j = end; j < n; ++j) {
      for (std::int64_t k = end - 1; k >= first; --k) {  // s L_BB = L_jB, from the last column on
        double v = l.at(j, k);
        for (std::int64_t i = k + 1; i < end; ++i)
          v -= share[static_cast<std::size_t>(i - first)] * l.at(i, k);
        share[static_cast<std::size_t>(k - first)] = v / l.at(k, k);
      }
      std::copy_n(share.begin(), end - first, shares.data() + j * n + first);
    }
  }
  return shares;
}

}  // namespace

void round_rows(Matrix w, DType dtype) {
  std::vector<std::byte> packed(static_cast<std::size_t>(row_bytes(dtype, w.cols)));
  for (std::int64_t r = 0; r < w.rows; ++r) {
    round_span(dtype, {w.row(r), static_cast<std::size_t>(w.cols)}, packed);
  }
}

void round_inputs(Context& ctx, Matrix w, const DMatrix& l, DType dtype) {
  const std::int64_t n = w.cols;
  check(w, n, l, dtype);
  if (dtype == DType::F32) return;
  const std::int64_t length = block_length(dtype, n);
  const AlignedBuffer<float> share = shares_of_lost(l, n, length);
  const int n_threads = ctx.pool.n_threads();
  ctx.pool.run([&](int thread) {
    const Range range = split(w.rows, n_threads, thread);
    if (range.size() == 0) return;
    AlignedBuffer<float> lost_buffer(static_cast<std::size_t>(range.size() * n));
    AlignedBuffer<float> wanted_buffer(static_cast<std::size_t>(range.size() * length));
    std::vector<std::byte> packed(static_cast<std::size_t>(row_bytes(dtype, length)));
    for (std::int64_t block = (n + length - 1) / length - 1; block >= 0; --block) {
      const std::int64_t first = block * length;
      const std::int64_t end = std::min(n, first + length);
      const Matrix lost(lost_buffer.data() + first, range.size(), end - first, n);
      const Matrix wanted(wanted_buffer.data(), range.size(), end - first);
      kernels::gemm_on_this_thread(
          false, false, 1, ConstMatrix(lost_buffer.data() + end, range.size(), n - end, n),
          ConstMatrix(share.data() + end * n + first, n - end, end - first, n), 0, wanted);
      for (std::int64_t r = 0; r < range.size(); ++r) {
        float* row = w.row(range.begin + r) + first;
        for (std::int64_t k = 0; k < end - first; ++k) {
          lost.row(r)[k] = row[k];
          row[k] += wanted.row(r)[k];
        }
        round_span(dtype, {row, static_cast<std::size_t>(end - first)}, packed);
        for (std::int64_t k = 0; k < end - first; ++k) lost.row(r)[k] -= row[k];
      }
    }
  });
}

void round_outputs(Context& ctx, Matrix w, const DMatrix& l, DType dtype) {
  const std::int64_t n = w.rows;
  check(w, n, l, dtype);
  if (dtype == DType::F32) return;
  const std::int64_t length = block_length(dtype, w.cols);
  const int n_threads = ctx.pool.n_threads();
  // Columns of W are sums of their own: each thread takes whole blocks of them through all rows.
  ctx.pool.run([&](int thread) {
    const Range cols = split(w.cols, n_threads, thread, length);
    if (cols.size() == 0) return;
    const auto size = static_cast<std::size_t>(cols.size());
    std::vector<std::byte> packed(static_cast<std::size_t>(row_bytes(dtype, cols.size())));
    std::vector<float> lost(static_cast<std::size_t>(n) * size);
    for (std::int64_t k = n - 1; k >= 0; --k) {
      float* row = w.row(k) + cols.begin;
      float* own = lost.data() + static_cast<std::size_t>(k) * size;
      std::copy_n(row, size, own);
      const double diagonal = l.at(k, k);
      for (std::int64_t j = k + 1; j < n; ++j) {
        const auto share = static_cast<float>(l.at(j, k) / diagonal);
        const float* e = lost.data() + static_cast<std::size_t>(j) * size;
        for (std::size_t i = 0; i < size; ++i) row[i] += share * e[i];
      }
      round_span(dtype, {row, size}, packed);
      for (std::size_t i = 0; i < size; ++i) own[i] -= row[i];
    }
  });
}

}  // namespace moesaic::converter
