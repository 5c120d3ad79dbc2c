#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>

#include "kernels/cuda/base/stream.h"

namespace moesaic::cuda {

/// Device memory, a multiple of 256 bytes from the device's point of view. Throws DeviceError with
/// the size.
std::byte* allocate_bytes(std::size_t bytes);
void free_bytes(std::byte* data) noexcept;

/// Queued copies and fills. Host memory stays as it is until the stream has been synchronised.
/// Throw DeviceError.
void copy_bytes_in(std::byte* device, const void* host, std::size_t bytes, StreamHandle stream);
void copy_bytes_out(void* host, const std::byte* device, std::size_t bytes, StreamHandle stream);
void zero_bytes(std::byte* device, std::size_t bytes, StreamHandle stream);

/// Owned device array of trivial elements, uninitialised.
template <class T>
class DeviceBuffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(std::size_t n) : size_(n) {
    if (n > 0) data_ = allocate_bytes(n * sizeof(T));
  }
  ~DeviceBuffer() {
    if (data_ != nullptr) free_bytes(data_);
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  T* data() const { return reinterpret_cast<T*>(data_); }
  std::size_t size() const { return size_; }

  /// values.size() == size(), in both.
  void copy_from(std::span<const T> values, StreamHandle stream) {
    copy_bytes_in(data_, values.data(), values.size_bytes(), stream);
  }
  void copy_to(std::span<T> values, StreamHandle stream) const {
    copy_bytes_out(values.data(), data_, values.size_bytes(), stream);
  }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace moesaic::cuda
