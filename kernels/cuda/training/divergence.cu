#include <cuda_bf16.h>

#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/training/divergence.h"
#include "kernels/cuda/training/reduce.cuh"

namespace moesaic::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// A block a row. p_i (ln p_i − ln q_i) = e_i (p_i − q_i) / sum + …: kept are differences of logits
// less their maxima, so that nothing cancels between large numbers.
__global__ void __launch_bounds__(kThreads)
    kl_divergence_kernel(const float* p, const float* q, std::int64_t n, float unit,
                         double* divergence, std::uint16_t* gradient) {
  __shared__ float maxima[kWarps];
  __shared__ double sums[3][kWarps];
  __shared__ float scale[2];
  const std::int64_t row = blockIdx.x;
  p += row * n;
  q += row * n;
  float p_max = -INFINITY, q_max = -INFINITY;
  for (std::int64_t i = threadIdx.x; i < n; i += kThreads) {
    p_max = fmaxf(p_max, p[i]);
    q_max = fmaxf(q_max, q[i]);
  }
  p_max = block_max(p_max, maxima);
  q_max = block_max(q_max, maxima);
  float p_part = 0, q_part = 0, cross_part = 0;
  for (std::int64_t i = threadIdx.x; i < n; i += kThreads) {
    const float p_below = p[i] - p_max, q_below = q[i] - q_max, e = expf(p_below);
    p_part += e;
    q_part += expf(q_below);
    cross_part += e * (p_below - q_below);
  }
  const double p_sum = block_sum_of_doubles(p_part, sums[0]);
  const double q_sum = block_sum_of_doubles(q_part, sums[1]);
  const double cross = block_sum_of_doubles(cross_part, sums[2]);
  if (threadIdx.x == 0) {
    divergence[row] = cross / p_sum + logf(static_cast<float>(q_sum / p_sum));
    scale[0] = static_cast<float>(unit / p_sum);
    scale[1] = static_cast<float>(unit / q_sum);
  }
  if (gradient == nullptr) return;
  __syncthreads();
  gradient += row * n;
  const float p_unit = scale[0], q_unit = scale[1];
  for (std::int64_t i = threadIdx.x; i < n; i += kThreads) {
    const float slope = q_unit * expf(q[i] - q_max) - p_unit * expf(p[i] - p_max);
    gradient[i] = __bfloat16_as_ushort(__float2bfloat16_rn(slope));
  }
}

__global__ void __launch_bounds__(kThreads)
    add_up_kernel(const double* values, std::int64_t n, double* total) {
  __shared__ double sums[kWarps];
  double part = 0;
  for (std::int64_t i = threadIdx.x; i < n; i += kThreads) part += values[i];
  const double sum = block_sum_of_doubles(part, sums);
  if (threadIdx.x == 0) *total += sum;
}

}  // namespace

void kl_divergence(ConstMatrix p, ConstMatrix q, float unit, double* divergence,
                   std::uint16_t* gradient, StreamHandle stream) {
  require<ShapeError>(p.rows == q.rows && p.cols == q.cols && p.cols > 0 && p.stride == p.cols &&
                          q.stride == q.cols,
                      "kl_divergence: logits [{}, {}] and [{}, {}], expected the same shape, a "
                      "column at least and no gaps",
                      p.rows, p.cols, q.rows, q.cols);
  if (p.rows == 0) return;
  kl_divergence_kernel<<<static_cast<unsigned>(p.rows), kThreads, 0, stream>>>(
      p.data, q.data, p.cols, unit, divergence, gradient);
  check_launch("kl_divergence");
}

void add_up(const double* values, std::int64_t n, double* total, StreamHandle stream) {
  add_up_kernel<<<1, kThreads, 0, stream>>>(values, n, total);
  check_launch("add_up");
}

}  // namespace moesaic::cuda
