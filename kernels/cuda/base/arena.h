#pragma once

#include <cstddef>
#include <span>

#include "kernels/cuda/base/device_buffer.h"

namespace moesaic::cuda {

/// One device allocation of which parts are taken: a model's weights, the buffers of its passes, a
/// few pages of a cache. Nothing is given back before the arena itself, so that no step allocates
/// and every address in a captured graph stays good.
class Arena {
 public:
  /// Throws DeviceError if the device has not that much.
  explicit Arena(std::size_t bytes);

  /// n uninitialised elements at a multiple of 256 bytes. Throws DeviceError with the sizes if the
  /// arena is full.
  template <class T>
  std::span<T> take(std::size_t n) {
    return {reinterpret_cast<T*>(take_bytes(n * sizeof(T))), n};
  }

  std::size_t used() const { return used_; }
  std::size_t size() const { return memory_.size(); }

  /// Bytes that take() uses up for n elements of T.
  template <class T>
  static constexpr std::size_t bytes_for(std::size_t n) {
    return padded(n * sizeof(T));
  }

 private:
  static constexpr std::size_t kAlignment = 256;
  static constexpr std::size_t padded(std::size_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  std::byte* take_bytes(std::size_t bytes);

  DeviceBuffer<std::byte> memory_;
  std::size_t used_ = 0;
};

}  // namespace moesaic::cuda
