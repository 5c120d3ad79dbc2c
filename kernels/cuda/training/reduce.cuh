#pragma once

#include "kernels/cuda/base/warp.cuh"

namespace moesaic::cuda {

/// Sum of one double a thread over the block, in thread 0; the order depends on blockDim alone.
/// `shared` holds one a warp; what it held before is no longer needed by any thread.
__device__ inline double block_sum_of_doubles(double v, double* shared) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_down_sync(kAllLanes, v, offset);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = v;
  __syncthreads();
  if (threadIdx.x != 0) return 0;
  v = 0;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) v += shared[w];
  return v;
}

}  // namespace moesaic::cuda
