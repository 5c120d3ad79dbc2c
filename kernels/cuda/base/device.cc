#include "kernels/cuda/base/device.h"

#include "kernels/cuda/base/check.h"

namespace moesaic::cuda {

void use_device(int index) {
  int n = 0;
  check(cudaGetDeviceCount(&n), "GPU");
  require<DeviceError>(index >= 0 && index < n, "cuda:{}: {} GPUs found, expected one of 0 to {}",
                       index, n, n - 1);
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "GPU");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "GPU");
  require<DeviceError>(major >= 8, "cuda:{}: compute capability {}.{} found, expected 8.0 or later",
                       index, major, minor);
  check(cudaSetDevice(index), "GPU");
}

}  // namespace moesaic::cuda
