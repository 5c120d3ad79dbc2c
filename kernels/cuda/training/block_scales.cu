#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/base/warp.cuh"
#include "kernels/cuda/training/block_scales.h"

namespace moesaic::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlock = 32;  // weights, and lanes
static_assert(kBlock == kWarp);

// A warp a block of weights.
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const std::int8_t* codes, const float* gradient, std::int64_t n, float* scale,
                  float* offset) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x, block = i / kBlock;
  if (block >= n) return;
  const float g = gradient[i];
  const float scaled = warp_sum(static_cast<float>(codes[i]) * g), sum = warp_sum(g);
  if (threadIdx.x % kWarp != 0) return;
  scale[block] = scaled;
  if (offset != nullptr) offset[block] = sum;
}

__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const std::int8_t* codes, const float* scale, const float* offset,
                   std::int64_t n, float* weights) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x, block = i / kBlock;
  if (block >= n) return;
  // Rounded one by one, as the file's formats are unpacked.
  const float product = __fmul_rn(scale[block], static_cast<float>(codes[i]));
  weights[i] = offset == nullptr ? product : __fadd_rn(product, offset[block]);
}

unsigned blocks(std::int64_t n) { return static_cast<unsigned>(ceil_div(n * kBlock, kThreads)); }

}  // namespace

void gather_scales(const std::int8_t* codes, const float* gradient, std::int64_t n, float* scale,
                   float* offset, StreamHandle stream) {
  if (n == 0) return;
  gather_kernel<<<blocks(n), kThreads, 0, stream>>>(codes, gradient, n, scale, offset);
  check_launch("gather_scales");
}

void scatter_scales(const std::int8_t* codes, const float* scale, const float* offset,
                    std::int64_t n, float* weights, StreamHandle stream) {
  if (n == 0) return;
  scatter_kernel<<<blocks(n), kThreads, 0, stream>>>(codes, scale, offset, n, weights);
  check_launch("scatter_scales");
}

}  // namespace moesaic::cuda
