#pragma once

#include <cuda_runtime_api.h>

#include <string_view>

#include "kernels/base/error.h"

namespace moesaic::cuda {

/// Throws DeviceError with what was tried and the runtime's text unless `status` is success.
inline void check(cudaError_t status, std::string_view what) {
  if (status == cudaSuccess) return;
  throw DeviceError(fmt::format("cuda: {}: {}", what, cudaGetErrorString(status)));
}

/// Follows every launch: throws DeviceError if the kernel could not be queued, or if work queued
/// earlier has failed by now.
inline void check_launch(std::string_view kernel) { check(cudaGetLastError(), kernel); }

}  // namespace moesaic::cuda
