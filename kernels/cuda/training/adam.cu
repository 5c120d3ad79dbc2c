#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/training/adam.h"
#include "kernels/cuda/training/reduce.cuh"

namespace moesaic::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Every kSquareSumParts-th block's worth of elements, a part a block.
__global__ void __launch_bounds__(kThreads)
    square_parts_kernel(const float* g, std::int64_t n, double* parts) {
  __shared__ double sums[kWarps];
  double part = 0;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n;
       i += kSquareSumParts * kThreads) {
    part += static_cast<double>(g[i]) * g[i];
  }
  const double sum = block_sum_of_doubles(part, sums);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    square_sum_kernel(const double* parts, int n, double* square) {
  __shared__ double sums[kWarps];
  const double part = threadIdx.x < n ? parts[threadIdx.x] : 0;
  const double sum = block_sum_of_doubles(part, sums);
  if (threadIdx.x == 0) *square = sum;
}

__global__ void __launch_bounds__(kThreads)
    clip_scale_kernel(const double* squares, std::int64_t n_clipped, std::int64_t n, double clip,
                      float* scale) {
  __shared__ double sums[2][kWarps];
  double clipped = 0, others = 0;
  for (std::int64_t i = threadIdx.x; i < n; i += kThreads) {
    (i < n_clipped ? clipped : others) += squares[i];
  }
  const double norm = sqrt(block_sum_of_doubles(clipped, sums[0]));
  const double rest = block_sum_of_doubles(others, sums[1]);
  if (threadIdx.x != 0) return;
  const bool finite = isfinite(norm) && isfinite(rest);
  scale[0] = !finite ? NAN : clip > 0 && norm > clip ? static_cast<float>(clip / norm) : 1.0f;
  scale[1] = finite ? 1.0f : NAN;
}

__global__ void __launch_bounds__(kThreads)
    adam_kernel(AdamStep step, const float* scale, std::int64_t n, float* value, float* gradient,
                float* m, float* v) {
  constexpr float kBeta1 = 0.9f, kBeta2 = 0.999f;
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const float times = *scale;
  if (i >= n || isnan(times)) return;
  const float g = gradient[i] * times;
  const float first = kBeta1 * m[i] + (1 - kBeta1) * g;
  const float second = kBeta2 * v[i] + (1 - kBeta2) * g * g;
  m[i] = first;
  v[i] = second;
  value[i] -= step.rate * (first * step.correction1) / (sqrtf(second * step.correction2) + 1e-8f);
  gradient[i] = 0;
}

}  // namespace

void square_sum(const float* g, std::int64_t n, double* workspace, double* square,
                StreamHandle stream) {
  static_assert(kSquareSumParts <= kThreads);
  const auto parts = static_cast<int>(std::min(ceil_div(n, kThreads), kSquareSumParts));
  if (parts > 0) {
    square_parts_kernel<<<parts, kThreads, 0, stream>>>(g, n, workspace);
    check_launch("square_sum, parts");
  }
  square_sum_kernel<<<1, kThreads, 0, stream>>>(workspace, parts, square);
  check_launch("square_sum");
}

void clip_scale(const double* squares, std::int64_t n_clipped, std::int64_t n, double clip,
                float* scale, StreamHandle stream) {
  clip_scale_kernel<<<1, kThreads, 0, stream>>>(squares, n_clipped, n, clip, scale);
  check_launch("clip_scale");
}

void adam(const AdamStep& step, const float* scale, std::int64_t n, float* value, float* gradient,
          float* m, float* v, StreamHandle stream) {
  if (n == 0) return;
  adam_kernel<<<static_cast<unsigned>(ceil_div(n, kThreads)), kThreads, 0, stream>>>(
      step, scale, n, value, gradient, m, v);
  check_launch("adam");
}

}  // namespace moesaic::cuda
