#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <type_traits>

#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/stream.h"

namespace moesaic::cuda {

/// Waits for all blocks of a cooperative launch; what they wrote before is then visible to reads
/// past the first-level cache. `arrived` is zero before its first use. Sleeps while it waits, so
/// that a block that does not is not held up.
__device__ inline void grid_barrier(unsigned* arrived) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    // All additions together turn the highest bit over and leave the others zero.
    constexpr unsigned kTurn = 0x80000000u;
    const unsigned before = atomicAdd(arrived, blockIdx.x == 0 ? kTurn - (gridDim.x - 1) : 1u);
    while (((before ^ *static_cast<volatile unsigned*>(arrived)) & kTurn) == 0) __nanosleep(50);
    __threadfence();
  }
  __syncthreads();
}

/// Launches blocks that meet at grid barriers: as many as the current device holds at once, but at
/// most n_blocks; the kernel must do with fewer.
template <class... Args>
void launch_cooperative(std::string_view what, void (*kernel)(Args...), std::int64_t n_blocks,
                        int n_threads, StreamHandle stream, std::type_identity_t<Args>... args) {
  int device = 0, n_processors = 0, n_resident = 0;
  check(cudaGetDevice(&device), what);
  check(cudaDeviceGetAttribute(&n_processors, cudaDevAttrMultiProcessorCount, device), what);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n_resident, kernel, n_threads, 0), what);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(
      std::min<std::int64_t>(n_blocks, std::int64_t{n_processors} * n_resident)));
  config.blockDim = dim3(static_cast<unsigned>(n_threads));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, args...), what);
}

}  // namespace moesaic::cuda
