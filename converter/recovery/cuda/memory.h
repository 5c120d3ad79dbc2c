#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <type_traits>

#include "kernels/base/view.h"
#include "kernels/cuda/base/arena.h"
#include "kernels/cuda/base/stream.h"

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

template <class T>
auto* bytes(std::span<T> part) {
  using Byte = std::conditional_t<std::is_const_v<T>, const std::byte, std::byte>;
  return reinterpret_cast<Byte*>(part.data());
}

/// Queued copies of whole parts; the host's memory stays until the stream was synchronised.
template <class T>
void copy_in(std::span<const T> host, std::span<T> device, const cuda::Stream& stream) {
  cuda::copy_bytes_in(bytes(device), host.data(), host.size_bytes(), stream);
}
template <class T>
void copy_out(std::span<const T> device, std::span<T> host, const cuda::Stream& stream) {
  cuda::copy_bytes_out(host.data(), bytes(device), host.size_bytes(), stream);
}
template <class T>
void zero(std::span<T> part, const cuda::Stream& stream) {
  cuda::zero_bytes(bytes(part), part.size_bytes(), stream);
}

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
