#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/top_k.cuh"
#include "kernels/cuda/top_k.h"

namespace moesaic::cuda {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads)
    top_k_kernel(ConstMatrix scores, std::int64_t k, std::int32_t* ids) {
  __shared__ TopKShared shared;
  block_top_k(scores.data + blockIdx.x * scores.stride, scores.cols, k, ids + blockIdx.x * k,
              shared);
}

__global__ void __launch_bounds__(kThreads) softmax_kernel(ConstMatrix x, Matrix y) {
  __shared__ float partial[kThreads / kWarp];
  const float* from = x.data + blockIdx.x * x.stride;
  float* to = y.data + blockIdx.x * y.stride;
  float maximum = -INFINITY;
  for (std::int64_t i = threadIdx.x; i < x.cols; i += kThreads) maximum = fmaxf(maximum, from[i]);
  maximum = block_max(maximum, partial);
  float sum = 0;
  for (std::int64_t i = threadIdx.x; i < x.cols; i += kThreads) {
    const float e = expf(from[i] - maximum);
    to[i] = e;
    sum += e;
  }
  sum = block_sum(sum, partial);
  for (std::int64_t i = threadIdx.x; i < x.cols; i += kThreads) to[i] /= sum;
}

}  // namespace

void top_k(ConstMatrix scores, std::int64_t k, std::int32_t* ids, StreamHandle stream) {
  require<ShapeError>(k >= 0 && k <= scores.cols, "top_k: k is {}, expected 0 to {}", k,
                      scores.cols);
  if (scores.rows == 0 || k == 0) return;
  top_k_kernel<<<static_cast<unsigned>(scores.rows), kThreads, 0, stream>>>(scores, k, ids);
  check_launch("top_k");
}

void softmax(ConstMatrix x, Matrix y, StreamHandle stream) {
  require<ShapeError>(x.rows == y.rows && x.cols == y.cols,
                      "softmax: output is [{}, {}], expected [{}, {}]", y.rows, y.cols, x.rows,
                      x.cols);
  if (x.rows == 0 || x.cols == 0) return;
  softmax_kernel<<<static_cast<unsigned>(x.rows), kThreads, 0, stream>>>(x, y);
  check_launch("softmax");
}

}  // namespace moesaic::cuda
