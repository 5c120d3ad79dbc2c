#include "converter/recovery/attention.h"

#include <algorithm>
#include <cmath>

#include "kernels/base/error.h"

namespace moesaic::converter {
namespace {

// Query rows per block: scores of 128 × 512 stay in the second-level cache, and of the square of
// scores the causal blocks leave out 3/8.
constexpr std::int64_t kBlock = 128;

// Columns [first, first + n) of rows [row, row + rows).
template <class T>
MatrixView<T> part(MatrixView<T> m, std::int64_t row, std::int64_t rows, std::int64_t first,
                   std::int64_t n) {
  return {m.row(row) + first, rows, n, m.stride};
}

// One block of queries of one head, and the keys it can see.
struct Block {
  std::int64_t query = 0;  // first row
  std::int64_t n_queries = 0;
  std::int64_t key = 0;
  std::int64_t n_keys = 0;

  // Keys that query i of the block sees, counted from `key`.
  Range seen(std::int64_t i, std::int64_t window) const {
    const std::int64_t end = query + i - key + 1;
    return {window == 0 ? 0 : std::max<std::int64_t>(0, end - window), end};
  }
};

// fn(window's first row, key/value head, thread) over all of them; each is a task of its own.
template <class Fn>
void for_each_group(Context& ctx, const AttentionShape& s, std::int64_t n_rows, Fn&& fn) {
  const std::int64_t n_tasks = n_rows / s.n_ctx * s.n_kv_heads;
  for_each_row(ctx, n_tasks, [&](std::int64_t task, int thread) {
    fn(task / s.n_kv_heads * s.n_ctx, static_cast<int>(task % s.n_kv_heads), thread);
  });
}

template <class Fn>
void for_each_block(const AttentionShape& s, std::int64_t first_row, Fn&& fn) {
  for (std::int64_t q = 0; q < s.n_ctx; q += kBlock) {
    const std::int64_t n = std::min(kBlock, s.n_ctx - q);
    const std::int64_t key = s.window == 0 ? 0 : std::max<std::int64_t>(0, q - s.window + 1);
    fn(Block{first_row + q, n, first_row + key, q + n - key});
  }
}

void check(const AttentionShape& s, std::int64_t n_rows) {
  require<ShapeError>(s.n_ctx > 0 && n_rows % s.n_ctx == 0,
                      "attention: {} rows, expected whole windows of {}", n_rows, s.n_ctx);
  require<ShapeError>(s.n_kv_heads > 0 && s.n_heads % s.n_kv_heads == 0,
                      "attention: {} heads, expected a multiple of {} key/value heads", s.n_heads,
                      s.n_kv_heads);
}

// Per thread: blocks of [kBlock, n_ctx].
template <class T>
struct Scratch {
  Scratch(Context& ctx, const AttentionShape& s, std::int64_t blocks_per_thread)
      : per_thread(blocks_per_thread * kBlock * s.n_ctx),
        data(ctx.workspace.take<T>(static_cast<std::size_t>(per_thread * ctx.pool.n_threads()))
                 .data()) {}
  MatrixView<T> block(int thread, std::int64_t i, const Block& b) const {
    const std::int64_t size = b.n_queries * b.n_keys;
    return {data + thread * per_thread + i * size, b.n_queries, b.n_keys};
  }
  std::int64_t per_thread;
  T* data;
};

}  // namespace

template <class T>
void attention_forward(Context& ctx, const AttentionShape& s, MatrixView<const T> q,
                       MatrixView<const T> k, MatrixView<const T> v, MatrixView<T> out,
                       MatrixView<T> lse) {
  check(s, q.rows);
  const Workspace::Scope scope(ctx.workspace);
  const Scratch<T> scratch(ctx, s, 1);
  const std::int64_t d = s.head_dim;
  const int group = s.n_heads / s.n_kv_heads;
  for_each_group(ctx, s, q.rows, [&](std::int64_t first_row, int kv, int thread) {
    for_each_block(s, first_row, [&](const Block& b) {
      const auto keys = part(k, b.key, b.n_keys, kv * d, d);
      const auto values = part(v, b.key, b.n_keys, kv * d, d);
      for (int head = kv * group; head < (kv + 1) * group; ++head) {
        const MatrixView<T> p = scratch.block(thread, 0, b);
        multiply_here(false, true, static_cast<T>(s.scale),
                      part(q, b.query, b.n_queries, head * d, d), keys, false, p);
        for (std::int64_t i = 0; i < b.n_queries; ++i) {
          const Range seen = b.seen(i, s.window);
          T* row = p.row(i) + seen.begin;
          const T maximum = largest(row, seen.size());
          const T sum = exponentials(row, seen.size(), maximum, row);
          for (std::int64_t j = 0; j < seen.size(); ++j) row[j] /= sum;
          std::fill(p.row(i), row, T(0));
          std::fill(p.row(i) + seen.end, p.row(i) + b.n_keys, T(0));
          lse.row(b.query + i)[head] = maximum + std::log(sum);
        }
        multiply_here(false, false, T(1), MatrixView<const T>(p), values, false,
                      part(out, b.query, b.n_queries, head * d, d));
      }
    });
  });
}

template <class T>
void attention_backward(Context& ctx, const AttentionShape& s, MatrixView<const T> q,
                        MatrixView<const T> k, MatrixView<const T> v, MatrixView<const T> out,
                        MatrixView<const T> lse, MatrixView<const T> d_out, MatrixView<T> d_q,
                        MatrixView<T> d_k, MatrixView<T> d_v) {
  check(s, q.rows);
  const Workspace::Scope scope(ctx.workspace);
  const Scratch<T> scratch(ctx, s, 2);
  const std::int64_t d = s.head_dim;
  const int group = s.n_heads / s.n_kv_heads;
  const T scale = static_cast<T>(s.scale);
  for_each_group(ctx, s, q.rows, [&](std::int64_t first_row, int kv, int thread) {
    for (std::int64_t t = first_row; t < first_row + s.n_ctx; ++t) {
      std::fill_n(d_k.row(t) + kv * d, d, T(0));
      std::fill_n(d_v.row(t) + kv * d, d, T(0));
    }
    for_each_block(s, first_row, [&](const Block& b) {
      const auto keys = part(k, b.key, b.n_keys, kv * d, d);
      const auto values = part(v, b.key, b.n_keys, kv * d, d);
      for (int head = kv * group; head < (kv + 1) * group; ++head) {
        const auto queries = part(q, b.query, b.n_queries, head * d, d);
        const auto d_mixed = part(d_out, b.query, b.n_queries, head * d, d);
        const MatrixView<T> p = scratch.block(thread, 0, b);
        const MatrixView<T> d_p = scratch.block(thread, 1, b);
        multiply_here(false, true, scale, queries, keys, false, p);
        multiply_here(false, true, T(1), d_mixed, values, false, d_p);
        for (std::int64_t i = 0; i < b.n_queries; ++i) {
          const Range seen = b.seen(i, s.window);
          T* row = p.row(i) + seen.begin;
          exponentials(row, seen.size(), lse.row(b.query + i)[head], row);
          std::fill(p.row(i), row, T(0));
          std::fill(p.row(i) + seen.end, p.row(i) + b.n_keys, T(0));
          const T* o = out.row(b.query + i) + head * d;
          T mean = 0;
          for (std::int64_t j = 0; j < d; ++j) mean += o[j] * d_mixed.row(i)[j];
          T* ds = d_p.row(i);
          for (std::int64_t j = 0; j < b.n_keys; ++j) ds[j] = p.row(i)[j] * (ds[j] - mean);
        }
        multiply_here(true, false, T(1), MatrixView<const T>(p), d_mixed, true,
                      part(d_v, b.key, b.n_keys, kv * d, d));
        multiply_here(false, false, scale, MatrixView<const T>(d_p), keys, false,
                      part(d_q, b.query, b.n_queries, head * d, d));
        multiply_here(true, false, scale, MatrixView<const T>(d_p), queries, true,
                      part(d_k, b.key, b.n_keys, kv * d, d));
      }
    });
  });
}

template void attention_forward(Context&, const AttentionShape&, ConstMatrix, ConstMatrix,
                                ConstMatrix, Matrix, Matrix);
template void attention_backward(Context&, const AttentionShape&, ConstMatrix, ConstMatrix,
                                 ConstMatrix, ConstMatrix, ConstMatrix, ConstMatrix, Matrix, Matrix,
                                 Matrix);
template void attention_forward(Context&, const AttentionShape&, MatrixView<const double>,
                                MatrixView<const double>, MatrixView<const double>,
                                MatrixView<double>, MatrixView<double>);
template void attention_backward(Context&, const AttentionShape&, MatrixView<const double>,
                                 MatrixView<const double>, MatrixView<const double>,
                                 MatrixView<const double>, MatrixView<const double>,
                                 MatrixView<const double>, MatrixView<double>, MatrixView<double>,
                                 MatrixView<double>);

}  // namespace moesaic::converter
