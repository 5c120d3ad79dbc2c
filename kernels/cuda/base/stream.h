#pragma once

#include <utility>

struct CUstream_st;

namespace moesaic::cuda {

/// CUDA's own handle, so that what uses the backend sees no CUDA header.
using StreamHandle = CUstream_st*;

/// An owned queue of the current device's work, which waits for no other queue.
class Stream {
 public:
  /// Throws DeviceError.
  Stream();
  ~Stream();
  Stream(Stream&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Stream& operator=(Stream&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }

  /// Blocks the calling thread until all work is done. Throws DeviceError with what failed in it.
  void synchronize() const;
  operator StreamHandle() const { return handle_; }

 private:
  StreamHandle handle_ = nullptr;
};

}  // namespace moesaic::cuda
