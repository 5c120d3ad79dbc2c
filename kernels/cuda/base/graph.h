#pragma once

#include <concepts>
#include <utility>

#include "kernels/cuda/base/stream.h"

struct CUgraphExec_st;

namespace moesaic::cuda {

/// Work that was queued once and is launched again and again as a whole, on the same memory.
class Graph {
 public:
  Graph() = default;
  /// What `queue` gives the stream, recorded instead of run. Throws DeviceError, and what `queue`
  /// throws.
  template <std::invocable Queue>
  Graph(const Stream& stream, Queue&& queue) {
    begin_capture(stream);
    try {
      queue();
    } catch (...) {
      abandon_capture(stream);
      throw;
    }
    end_capture(stream);
  }
  ~Graph();
  Graph(Graph&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Graph& operator=(Graph&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }

  /// Throws DeviceError.
  void launch(const Stream& stream) const;

 private:
  static void begin_capture(const Stream& stream);
  static void abandon_capture(const Stream& stream) noexcept;
  void end_capture(const Stream& stream);

  CUgraphExec_st* handle_ = nullptr;
};

}  // namespace moesaic::cuda
