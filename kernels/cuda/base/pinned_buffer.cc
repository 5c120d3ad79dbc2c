#include "kernels/cuda/base/pinned_buffer.h"

#include "kernels/cuda/base/check.h"

namespace moesaic::cuda {

void* allocate_pinned(std::size_t bytes) {
  void* data = nullptr;
  check(cudaMallocHost(&data, bytes), fmt::format("{} bytes of pinned memory", bytes));
  return data;
}

void free_pinned(void* data) noexcept { cudaFreeHost(data); }

}  // namespace moesaic::cuda
