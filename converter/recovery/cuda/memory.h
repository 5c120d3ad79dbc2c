#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "kernels/base/view.h"
#include "kernels/cuda/base/arena.h"

namespace moesaic::converter {

/// Divides one arena into parts: the same walk twice, for the size and then for the memory.
class DeviceParts {
 public:
  /// walk(take), take(part, n) for each std::span<T>& part of n elements.
  template <class Walk>
  static std::unique_ptr<cuda::Arena> divide(Walk&& walk) {
    DeviceParts parts;
    walk(parts);
    parts.arena_ = std::make_unique<cuda::Arena>(parts.bytes_);
    walk(parts);
    return std::move(parts.arena_);
  }

  template <class T>
  void operator()(std::span<T>& part, std::int64_t n) {
    const auto count = static_cast<std::size_t>(n);
    if (arena_ == nullptr) {
      bytes_ += cuda::Arena::bytes_for<T>(count);
    } else {
      part = arena_->take<T>(count);
    }
  }

 private:
  std::size_t bytes_ = 0;
  std::unique_ptr<cuda::Arena> arena_;
};

/// The first rows · cols elements as a matrix.
template <class T>
MatrixView<T> view(std::span<T> part, std::int64_t rows, std::int64_t cols) {
  return {part.data(), rows, cols};
}

/// A row of heads as rows of their own.
template <class T>
MatrixView<T> heads(MatrixView<T> m, std::int64_t head_dim) {
  return {m.data, m.rows * (m.cols / head_dim), head_dim};
}

}  // namespace moesaic::converter
