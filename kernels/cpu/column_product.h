#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/base/dtype.h"
#include "kernels/base/thread_pool.h"

namespace moesaic::kernels {

/// A vector of which few entries count, as it enters products with columns (columns.h): the numbers
/// of panel_product.h's tiles, with what does not count as 0. Per unit of 32 columns a list of
/// those that count, filled up to a multiple of four with one of them times 0.
struct ColumnInput {
  std::int64_t n_units = 0;
  std::uint8_t* count = nullptr;  // [n_units]
  std::uint8_t* ids = nullptr;    // [n_units, 32], within the unit, ascending
  // In the order of ids, [n_units, 32] each:
  std::int8_t* high = nullptr;
  std::int8_t* low = nullptr;
  std::uint16_t* bf16 = nullptr;      // instead of the digits, for BF16 columns
  float* d = nullptr;                 // [n_units]
  float* d_sum = nullptr;             // [n_units]
  std::int32_t* minus_sum = nullptr;  // [n_units], −Σ of the integers
};

/// Scratch bytes of a ColumnInput.
constexpr std::int64_t column_input_bytes(std::int64_t cols) { return 6 * cols + 1024; }

/// Fills an input for columns of this format, in scratch memory of that size, 64-byte aligned.
/// x [cols], 0 where bit c % 32 of marks[c / 32] is not set; cols a multiple of 32.
ColumnInput make_column_input(DType dtype, const float* x, const std::uint32_t* marks,
                              std::int64_t cols, std::byte* scratch);

/// One product, on the calling thread: y[r] = Σ_c W[r, c] x_c for rows r of the range, whose
/// borders are multiples of kColumnRows (or the end of the matrix).
struct ColumnProduct {
  const std::byte* columns = nullptr;  // of the units that x covers
  DType dtype = DType::Q8_0;
  std::int64_t rows = 0;  // of the whole matrix
  Range range;            // of rows
  float* y = nullptr;     // [rows]
};

inline constexpr std::int64_t kColumnRows = 128;

/// Returns the bytes of W that it read. Quantised formats: bit for bit what multiply_panels() gives
/// for the same x. has_columns(dtype, rows, …).
std::int64_t multiply_columns(const ColumnProduct& product, const ColumnInput& x);

/// ids = places of the bits set in marks [n / 32], ascending; returns how many. `ids`
/// has room for n + 16. n a multiple of 32.
std::int64_t list_marked(const std::uint32_t* marks, std::int64_t n, std::int32_t* ids);

}  // namespace moesaic::kernels
