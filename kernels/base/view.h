#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/base/dtype.h"

namespace moesaic {

/// Borrowed row-major matrix of plain elements; `stride` elements from one row to the next.
template <class T>
struct MatrixView {
  T* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t stride = 0;

  MatrixView() = default;
  MatrixView(T* d, std::int64_t r, std::int64_t c) : data(d), rows(r), cols(c), stride(c) {}
  MatrixView(T* d, std::int64_t r, std::int64_t c, std::int64_t s)
      : data(d), rows(r), cols(c), stride(s) {}
  /// A mutable view converts to a read-only one.
  operator MatrixView<const T>() const { return {data, rows, cols, stride}; }

  T* row(std::int64_t r) const { return data + r * stride; }
  /// Rows [first, first + n).
  MatrixView slice(std::int64_t first, std::int64_t n) const {
    return {row(first), n, cols, stride};
  }
};

using ConstMatrix = MatrixView<const float>;
using Matrix = MatrixView<float>;

/// Borrowed weight matrix [rows, cols] of any DType, rows contiguous and packed one after the
/// other. `panels`, where given, is the same matrix in the order of kernels/panels.h, which
/// Activations::Q16 reads instead.
struct WeightView {
  const std::byte* data = nullptr;
  DType dtype = DType::F32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  const std::byte* panels = nullptr;

  std::int64_t row_bytes() const { return moesaic::row_bytes(dtype, cols); }
  std::int64_t bytes() const { return rows * row_bytes(); }
  const std::byte* row(std::int64_t r) const { return data + r * row_bytes(); }
  /// Rows [first, first + n), without panels.
  WeightView slice(std::int64_t first, std::int64_t n) const {
    return {row(first), dtype, n, cols, nullptr};
  }
  bool empty() const { return rows == 0 || cols == 0; }
};

}  // namespace moesaic
