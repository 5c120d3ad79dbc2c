#pragma once

#include <utility>

struct CUstream_st;
struct CUevent_st;

namespace moesaic::cuda {

/// CUDA's own handles, so that what uses the backend sees no CUDA header.
using StreamHandle = CUstream_st*;
using EventHandle = CUevent_st*;

class Stream;

/// A point in a stream's work.
class Event {
 public:
  /// Throws DeviceError.
  Event();
  ~Event();
  Event(Event&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }

  /// Stands from now on for all that `stream` has been given so far. Throws DeviceError.
  void record(const Stream& stream);
  EventHandle handle() const { return handle_; }

 private:
  EventHandle handle_ = nullptr;
};

/// An owned queue of the current device's work, which waits for no other queue unless told to.
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

  /// What comes next waits for the event. Throws DeviceError.
  void wait(const Event& event);
  /// Blocks the calling thread until all work is done. Throws DeviceError with what failed in it.
  void synchronize() const;
  operator StreamHandle() const { return handle_; }

 private:
  StreamHandle handle_ = nullptr;
};

}  // namespace moesaic::cuda
