#pragma once

#include <cstdint>

namespace moesaic::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = ~0u;

/// Second argument of __launch_bounds__ for kernels of so many warps a block: 128 registers a
/// thread. Left to itself the compiler spills some to make room for one block more.
__host__ __device__ constexpr int min_blocks(int warps) { return 16 / warps; }

/// Sum over the warp's lanes, the same bits in all of them.
__device__ inline float warp_sum(float v) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

__device__ inline float warp_max(float v) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, offset));
  }
  return v;
}

/// Combines one value per thread over the block; every thread gets the result. `shared` holds one
/// float per warp. The order depends on blockDim alone.
template <class WarpReduce, class Combine>
__device__ float block_reduce(float v, float* shared, WarpReduce warp_reduce, Combine combine) {
  v = warp_reduce(v);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = v;
  __syncthreads();
  v = shared[0];
  for (unsigned w = 1; w < blockDim.x / kWarp; ++w) v = combine(v, shared[w]);
  __syncthreads();  // shared may be written again
  return v;
}

__device__ inline float block_sum(float v, float* shared) {
  return block_reduce(v, shared, warp_sum, [](float a, float b) { return a + b; });
}

__device__ inline float block_max(float v, float* shared) {
  return block_reduce(v, shared, warp_max, [](float a, float b) { return fmaxf(a, b); });
}

}  // namespace moesaic::cuda
