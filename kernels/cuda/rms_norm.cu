#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/base/warp.cuh"
#include "kernels/cuda/rms_norm.h"

namespace moesaic::cuda {
namespace {

constexpr int kThreads = 256;

// One block per row. A thread reads what it wrote itself, so the sum needs no barrier of its own.
template <bool kAdd>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(float* x, std::int64_t x_stride, const float* r, std::int64_t r_stride,
                    const float* weight, float eps, float* y, std::int64_t y_stride,
                    std::int64_t d) {
  __shared__ float partial[kThreads / kWarp];
  x += blockIdx.x * x_stride;
  r += blockIdx.x * r_stride;
  y += blockIdx.x * y_stride;
  float squares = 0;
  for (std::int64_t i = threadIdx.x; i < d; i += kThreads) {
    float v = x[i];
    if constexpr (kAdd) x[i] = v += r[i];
    squares += v * v;
  }
  const float root = sqrtf(block_sum(squares, partial) / static_cast<float>(d) + eps);
  for (std::int64_t i = threadIdx.x; i < d; i += kThreads) y[i] = x[i] / root * weight[i];
}

__global__ void __launch_bounds__(kThreads)
    add_kernel(const float* y, std::int64_t y_stride, float* x, std::int64_t x_stride,
               std::int64_t d) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < d) x[blockIdx.y * x_stride + i] += y[blockIdx.y * y_stride + i];
}

void require_same_shape(const char* op, ConstMatrix a, ConstMatrix b) {
  require<ShapeError>(a.rows == b.rows && a.cols == b.cols,
                      "{}: operands are [{}, {}] and [{}, {}], expected the same shape", op, a.rows,
                      a.cols, b.rows, b.cols);
}

}  // namespace

void rms_norm(ConstMatrix x, const float* weight, float eps, Matrix y, StreamHandle stream) {
  require_same_shape("rms_norm", x, y);
  if (x.rows == 0 || x.cols == 0) return;
  // Without an addition the kernel only reads x.
  rms_norm_kernel<false><<<static_cast<unsigned>(x.rows), kThreads, 0, stream>>>(
      const_cast<float*>(x.data), x.stride, nullptr, 0, weight, eps, y.data, y.stride, x.cols);
  check_launch("rms_norm");
}

void add_rms_norm(Matrix x, ConstMatrix r, const float* weight, float eps, Matrix y,
                  StreamHandle stream) {
  require_same_shape("add_rms_norm", x, r);
  require_same_shape("add_rms_norm", x, y);
  if (x.rows == 0 || x.cols == 0) return;
  rms_norm_kernel<true><<<static_cast<unsigned>(x.rows), kThreads, 0, stream>>>(
      x.data, x.stride, r.data, r.stride, weight, eps, y.data, y.stride, x.cols);
  check_launch("add_rms_norm");
}

void add(ConstMatrix y, Matrix x, StreamHandle stream) {
  require_same_shape("add", x, y);
  if (x.rows == 0 || x.cols == 0) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(x.cols, kThreads)), static_cast<unsigned>(x.rows));
  add_kernel<<<grid, kThreads, 0, stream>>>(y.data, y.stride, x.data, x.stride, x.cols);
  check_launch("add");
}

}  // namespace moesaic::cuda
