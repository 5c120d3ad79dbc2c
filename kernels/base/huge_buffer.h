#pragma once

#include <cstddef>
#include <utility>

namespace moesaic {

/// Owned, zero-filled memory for weights that are streamed once per token: whole 2 MiB pages where
/// the system gives them (transparent huge pages), because with 4 KiB pages the page walks of a
/// virtual machine cost more than the reads (measured here, two threads: 15 GB/s against 26). The
/// system hands the pages out on first write, so that the threads that fill it pay for them.
class HugeBuffer {
 public:
  HugeBuffer() = default;
  /// Throws IoError if the system has no such memory.
  explicit HugeBuffer(std::size_t bytes);
  ~HugeBuffer();
  HugeBuffer(HugeBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  HugeBuffer& operator=(HugeBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  std::byte* data() { return data_; }
  const std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;  // a multiple of 2 MiB
  std::size_t size_ = 0;
};

}  // namespace moesaic
