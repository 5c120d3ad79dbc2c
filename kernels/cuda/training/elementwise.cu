#include <cuda_bf16.h>

#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/base/warp.cuh"
#include "kernels/cuda/training/elementwise.h"

namespace moesaic::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = kThreads / kWarp;  // of a block

__global__ void __launch_bounds__(kThreads)
    to_bf16_kernel(const float* from, std::int64_t n, std::uint16_t* to) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < n) to[i] = __bfloat16_as_ushort(__float2bfloat16_rn(from[i]));
}

// One warp per row. A lane reads what it alone writes, so dx may be dy.
__global__ void __launch_bounds__(kThreads)
    rms_norm_backward_kernel(ConstMatrix x, const float* weight, float eps, ConstMatrix dy,
                             bool accumulate, Matrix dx) {
  const int lane = threadIdx.x % kWarp;
  const std::int64_t t = std::int64_t{blockIdx.x} * kRows + threadIdx.x / kWarp;
  if (t >= x.rows) return;
  const float* from = x.data + t * x.stride;
  const float* gradient = dy.data + t * dy.stride;
  float* to = dx.data + t * dx.stride;
  const auto d = static_cast<float>(x.cols);
  float square = 0, product = 0;
  for (std::int64_t i = lane; i < x.cols; i += kWarp) {
    square += from[i] * from[i];
    product += from[i] * gradient[i] * weight[i];
  }
  const float scale = 1 / sqrtf(warp_sum(square) / d + eps);
  const float back = scale * scale * scale * warp_sum(product) / d;
  for (std::int64_t i = lane; i < x.cols; i += kWarp) {
    const float value = scale * weight[i] * gradient[i] - back * from[i];
    to[i] = accumulate ? to[i] + value : value;
  }
}

}  // namespace

void to_bf16(const float* from, std::int64_t n, std::uint16_t* to, StreamHandle stream) {
  if (n == 0) return;
  to_bf16_kernel<<<static_cast<unsigned>(ceil_div(n, kThreads)), kThreads, 0, stream>>>(from, n,
                                                                                        to);
  check_launch("to_bf16");
}

void copy(const float* from, std::int64_t n, float* to, StreamHandle stream) {
  if (n == 0) return;
  check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(n) * sizeof(float),
                        cudaMemcpyDeviceToDevice, stream),
        "copy within device memory");
}

void rms_norm_backward(ConstMatrix x, const float* weight, float eps, ConstMatrix dy,
                       bool accumulate, Matrix dx, StreamHandle stream) {
  require<ShapeError>(
      x.rows == dy.rows && x.cols == dy.cols && x.rows == dx.rows && x.cols == dx.cols,
      "rms_norm_backward: x is [{}, {}], dy [{}, {}], dx [{}, {}], expected the same shape", x.rows,
      x.cols, dy.rows, dy.cols, dx.rows, dx.cols);
  if (x.rows == 0 || x.cols == 0) return;
  rms_norm_backward_kernel<<<static_cast<unsigned>(ceil_div(x.rows, kRows)), kThreads, 0, stream>>>(
      x, weight, eps, dy, accumulate, dx);
  check_launch("rms_norm_backward");
}

}  // namespace moesaic::cuda
