#pragma once

#include <cstddef>
#include <memory>
#include <span>

namespace moesaic::cuda {

/// Host memory that the device copies from and to by itself. Throws DeviceError with the size.
void* allocate_pinned(std::size_t bytes);
void free_pinned(void* data) noexcept;

/// Owned array of trivial elements in such memory, uninitialised.
template <class T>
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  explicit PinnedBuffer(std::size_t n)
      : data_(n > 0 ? static_cast<T*>(allocate_pinned(n * sizeof(T))) : nullptr), size_(n) {}

  std::span<T> span() const { return {data_.get(), size_}; }

 private:
  struct Free {
    void operator()(T* data) const { free_pinned(data); }
  };
  std::unique_ptr<T, Free> data_;
  std::size_t size_ = 0;
};

}  // namespace moesaic::cuda
