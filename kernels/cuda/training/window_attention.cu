#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/base/warp.cuh"
#include "kernels/cuda/training/window_attention.h"

namespace moesaic::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = kThreads / kWarp;  // of a block

// The keys that query i of a window sees: [begin, i].
__device__ std::int64_t first_seen(std::int64_t i, std::int64_t window) {
  return window == 0 || i + 1 < window ? 0 : i + 1 - window;
}

// Scores of one window, [n_heads, n_ctx, n_ctx], become their softmax; zero for what is not seen. A
// warp a row; lse and the other rows below begin at the window's first one.
__global__ void __launch_bounds__(kThreads)
    softmax_kernel(float* scores, std::int64_t n_ctx, int n_heads, std::int64_t window,
                   float* lse) {
  const int lane = threadIdx.x % kWarp;
  const std::int64_t row = std::int64_t{blockIdx.x} * kRows + threadIdx.x / kWarp;
  if (row >= n_ctx * n_heads) return;
  const std::int64_t i = row % n_ctx, head = row / n_ctx, begin = first_seen(i, window);
  float* p = scores + row * n_ctx;
  float most = -INFINITY;
  for (std::int64_t j = begin + lane; j <= i; j += kWarp) most = fmaxf(most, p[j]);
  most = warp_max(most);
  float sum = 0;
  for (std::int64_t j = begin + lane; j <= i; j += kWarp) sum += expf(p[j] - most);
  sum = warp_sum(sum);
  const float share = 1 / sum;
  for (std::int64_t j = lane; j < n_ctx; j += kWarp) {
    p[j] = j >= begin && j <= i ? expf(p[j] - most) * share : 0.0f;
  }
  if (lane == 0) lse[i * n_heads + head] = most + logf(sum);
}

// Scores become the softmax P, products (dO Vᵀ) become dS.
__global__ void __launch_bounds__(kThreads)
    softmax_backward_kernel(float* scores, float* products, std::int64_t n_ctx, int n_heads,
                            int head_dim, std::int64_t window, const float* lse, const float* out,
                            const float* d_out) {
  const int lane = threadIdx.x % kWarp;
  const std::int64_t row = std::int64_t{blockIdx.x} * kRows + threadIdx.x / kWarp;
  if (row >= n_ctx * n_heads) return;
  const std::int64_t i = row % n_ctx, head = row / n_ctx, begin = first_seen(i, window);
  const std::int64_t at = (i * n_heads + head) * head_dim;
  float mean = 0;
  for (int c = lane; c < head_dim; c += kWarp) mean += out[at + c] * d_out[at + c];
  mean = warp_sum(mean);
  const float shift = lse[i * n_heads + head];
  float* p = scores + row * n_ctx;
  float* ds = products + row * n_ctx;
  for (std::int64_t j = lane; j < n_ctx; j += kWarp) {
    const bool seen = j >= begin && j <= i;
    const float share = seen ? expf(p[j] - shift) : 0.0f;
    p[j] = share;
    ds[j] = seen ? share * (ds[j] - mean) : 0.0f;
  }
}

void check_shapes(const WindowShape& s, ConstMatrix q, ConstMatrix k, ConstMatrix v,
                  ConstMatrix out, ConstMatrix lse, std::span<float> workspace) {
  require<ShapeError>(s.n_ctx > 0 && q.rows % s.n_ctx == 0,
                      "attention: {} rows, expected whole windows of {}", q.rows, s.n_ctx);
  require<ShapeError>(s.n_kv_heads > 0 && s.n_heads % s.n_kv_heads == 0,
                      "attention: {} heads, expected a multiple of {} key/value heads", s.n_heads,
                      s.n_kv_heads);
  const std::int64_t q_cols = std::int64_t{s.n_heads} * s.head_dim;
  const std::int64_t kv_cols = std::int64_t{s.n_kv_heads} * s.head_dim;
  for (const auto& [m, cols] : {std::pair{q, q_cols},
                                {k, kv_cols},
                                {v, kv_cols},
                                {out, q_cols},
                                {lse, std::int64_t{s.n_heads}}}) {
    require<ShapeError>(m.rows == q.rows && m.cols == cols && m.stride == cols,
                        "attention: [{}, {}] in rows of {}, expected [{}, {}] without gaps", m.rows,
                        m.cols, m.stride, q.rows, cols);
  }
  require<ShapeError>(workspace.size() >= window_attention_workspace(s),
                      "attention: workspace of {} floats, expected {}", workspace.size(),
                      window_attention_workspace(s));
}

// Columns of the heads g, g + group, …: the batch of a product.
template <class T>
Blas::Batch<T> every_group(MatrixView<T> m, std::int64_t row, const WindowShape& s, int g) {
  const std::int64_t group = s.n_heads / s.n_kv_heads;
  return {{m.data + row * m.stride + std::int64_t{g} * s.head_dim, s.n_ctx, s.head_dim, m.stride},
          group * s.head_dim};
}

// Those of the key/value heads.
template <class T>
Blas::Batch<T> every_head(MatrixView<T> m, std::int64_t row, const WindowShape& s) {
  return {{m.data + row * m.stride, s.n_ctx, s.head_dim, m.stride}, s.head_dim};
}

// Squares of scores of the heads g, g + group, ….
template <class T>
Blas::Batch<T> squares(T* data, const WindowShape& s, int g) {
  const std::int64_t square = s.n_ctx * s.n_ctx;
  return {{data + g * square, s.n_ctx, s.n_ctx}, s.n_heads / s.n_kv_heads * square};
}

unsigned blocks(const WindowShape& s) {
  return static_cast<unsigned>(ceil_div(s.n_ctx * s.n_heads, kRows));
}

}  // namespace

std::size_t window_attention_workspace(const WindowShape& s) {
  return static_cast<std::size_t>(2 * s.n_heads * s.n_ctx * s.n_ctx);
}

void window_attention(Blas& blas, const WindowShape& s, ConstMatrix q, ConstMatrix k, ConstMatrix v,
                      Matrix out, Matrix lse, std::span<float> workspace, StreamHandle stream) {
  check_shapes(s, q, k, v, out, lse, workspace);
  float* scores = workspace.data();
  const int group = s.n_heads / s.n_kv_heads;
  for (std::int64_t row = 0; row < q.rows; row += s.n_ctx) {
    for (int g = 0; g < group; ++g) {
      blas.multiply_batch(s.n_kv_heads, false, true, s.scale, every_group(q, row, s, g),
                          every_head(k, row, s), false, squares(scores, s, g));
    }
    softmax_kernel<<<blocks(s), kThreads, 0, stream>>>(scores, s.n_ctx, s.n_heads, s.window,
                                                       lse.data + row * s.n_heads);
    check_launch("attention, softmax");
    for (int g = 0; g < group; ++g) {
      blas.multiply_batch(s.n_kv_heads, false, false, 1, squares<const float>(scores, s, g),
                          every_head(v, row, s), false, every_group(out, row, s, g));
    }
  }
}

void window_attention_backward(Blas& blas, const WindowShape& s, ConstMatrix q, ConstMatrix k,
                               ConstMatrix v, ConstMatrix out, ConstMatrix lse, ConstMatrix d_out,
                               Matrix d_q, Matrix d_k, Matrix d_v, std::span<float> workspace,
                               StreamHandle stream) {
  check_shapes(s, q, k, v, out, lse, workspace);
  check_shapes(s, d_q, d_k, d_v, d_out, lse, workspace);
  float* scores = workspace.data();
  float* products = scores + s.n_heads * s.n_ctx * s.n_ctx;
  const int group = s.n_heads / s.n_kv_heads, n = s.n_kv_heads;
  for (std::int64_t row = 0; row < q.rows; row += s.n_ctx) {
    for (int g = 0; g < group; ++g) {
      blas.multiply_batch(n, false, true, s.scale, every_group(q, row, s, g), every_head(k, row, s),
                          false, squares(scores, s, g));
      blas.multiply_batch(n, false, true, 1, every_group(d_out, row, s, g), every_head(v, row, s),
                          false, squares(products, s, g));
    }
    softmax_backward_kernel<<<blocks(s), kThreads, 0, stream>>>(
        scores, products, s.n_ctx, s.n_heads, s.head_dim, s.window, lse.data + row * s.n_heads,
        out.data + row * out.stride, d_out.data + row * d_out.stride);
    check_launch("attention, softmax's gradient");
    // Heads that share keys and values add to one gradient, in order.
    for (int g = 0; g < group; ++g) {
      const auto p = squares<const float>(scores, s, g), ds = squares<const float>(products, s, g);
      blas.multiply_batch(n, true, false, 1, p, every_group(d_out, row, s, g), g > 0,
                          every_head(d_v, row, s));
      blas.multiply_batch(n, false, false, s.scale, ds, every_head(k, row, s), false,
                          every_group(d_q, row, s, g));
      blas.multiply_batch(n, true, false, s.scale, ds, every_group(q, row, s, g), g > 0,
                          every_head(d_k, row, s));
    }
  }
}

}  // namespace moesaic::cuda
