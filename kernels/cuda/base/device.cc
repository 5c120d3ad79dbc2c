#include "kernels/cuda/base/device.h"

#include "kernels/cuda/base/check.h"

namespace moesaic::cuda {

void use_device(int index) {
  int n = 0;
  const cudaError_t status = cudaGetDeviceCount(&n);
  require<DeviceError>(status != cudaErrorInsufficientDriver && status != cudaErrorNoDevice,
                       "cuda:{}: no GPU, or no driver for CUDA {}, found: {}", index,
                       CUDART_VERSION / 1000, cudaGetErrorString(status));
  check(status, "GPU");
  require<DeviceError>(index >= 0 && index < n, "cuda:{}: {} found, expected cuda:0{}", index,
                       n == 1 ? "1 GPU" : fmt::format("{} GPUs", n),
                       n == 1 ? "" : fmt::format(" to cuda:{}", n - 1));
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "GPU");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "GPU");
  require<DeviceError>(major >= 8, "cuda:{}: compute capability {}.{} found, expected 8.0 or later",
                       index, major, minor);
  check(cudaSetDevice(index), "GPU");
}

}  // namespace moesaic::cuda
