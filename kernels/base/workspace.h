#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "kernels/base/aligned_buffer.h"

namespace moesaic {

/// Scratch memory that a caller lends to kernels: a stack of 64-byte aligned spans. It grows on the
/// first pass over a shape and never again, so that a steady-state decode step allocates nothing.
/// Not thread-safe: taken from before the threads start.
class Workspace {
 public:
  /// Gives back on destruction everything that was taken since construction.
  class Scope {
   public:
    explicit Scope(Workspace& w) : w_(w), block_(w.block_), used_(w.used_) {}
    ~Scope() {
      w_.block_ = block_;
      w_.used_ = used_;
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Workspace& w_;
    std::size_t block_;
    std::size_t used_;
  };

  /// n uninitialised elements, valid until the enclosing Scope ends.
  template <class T>
  std::span<T> take(std::size_t n) {
    return {reinterpret_cast<T*>(take_bytes(n * sizeof(T))), n};
  }

  /// Bytes held, in use or not.
  std::size_t capacity() const {
    std::size_t total = 0;
    for (const auto& b : blocks_) total += b.size();
    return total;
  }

 private:
  std::byte* take_bytes(std::size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    while (block_ < blocks_.size() && used_ + bytes > blocks_[block_].size()) {
      ++block_;
      used_ = 0;
    }
    if (block_ == blocks_.size()) {
      constexpr std::size_t kBlock = std::size_t{1} << 20;
      blocks_.emplace_back(bytes > kBlock ? bytes : kBlock);
    }
    std::byte* p = blocks_[block_].data() + used_;
    used_ += bytes;
    return p;
  }

  std::vector<AlignedBuffer<std::byte>> blocks_;
  std::size_t block_ = 0;  // block being filled
  std::size_t used_ = 0;   // bytes used in it
};

}  // namespace moesaic
