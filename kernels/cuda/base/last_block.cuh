#pragma once

namespace moesaic::cuda {

/// True in all threads of the block that comes here last of n_blocks; what the others wrote before
/// is then visible to reads past the first-level cache. `done` is zero before and afterwards.
__device__ inline bool last_block(unsigned* done, unsigned n_blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicInc(done, n_blocks - 1) == n_blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace moesaic::cuda
