#include "kernels/cuda/base/device_buffer.h"

#include "kernels/cuda/base/check.h"

namespace moesaic::cuda {

std::byte* allocate_bytes(std::size_t bytes) {
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, bytes);
  if (status != cudaSuccess) {
    cudaGetLastError();  // a refused allocation leaves the device usable
    throw DeviceError(
        fmt::format("cuda: {} bytes of device memory: {}", bytes, cudaGetErrorString(status)));
  }
  return static_cast<std::byte*>(data);
}

void free_bytes(std::byte* data) noexcept { cudaFree(data); }

void copy_bytes_in(std::byte* device, const void* host, std::size_t bytes, StreamHandle stream) {
  if (bytes == 0) return;
  check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream), "copy to device");
}

void copy_bytes_out(void* host, const std::byte* device, std::size_t bytes, StreamHandle stream) {
  if (bytes == 0) return;
  check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream), "copy from device");
}

void zero_bytes(std::byte* device, std::size_t bytes, StreamHandle stream) {
  if (bytes == 0) return;
  check(cudaMemsetAsync(device, 0, bytes, stream), "fill");
}

}  // namespace moesaic::cuda
