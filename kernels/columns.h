#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/base/thread_pool.h"
#include "kernels/base/view.h"

namespace moesaic::kernels {

/// The order in which the fast path reads single columns of a matrix [rows, cols], for products
/// with vectors of which few entries count. Made at load time; every code and every scale is the
/// file's own, only moved. Units of 32 columns one after the other, each of them
///
/// - the scales of all rows, d (and then m) in float16; nothing in BF16;
/// - column by column the codes of all rows. Q4_*: per 128 rows 64 bytes, byte 16 l + 4 i + e is
///   row 16 i + 4 l + e in its low nibble and 64 more in the high one; for a last 64 rows 32 bytes,
///   8 i + 4 l + e and 32 more. Q8_0: code + 128, per 64 rows as the low nibbles. BF16: per 32
///   rows, element 8 l + 4 i + e is row 16 i + 4 l + e;
///
/// so that a column that does not count is not read, nor a unit without any, and four columns (two
/// in BF16) interleave into dot products of 16 rows in order.
struct ColumnLayout {
  std::int64_t scale_bytes = 0;   // of one unit
  std::int64_t column_bytes = 0;  // codes of one column
  std::int64_t unit_bytes() const { return scale_bytes + 32 * column_bytes; }
};

/// True if a matrix of this format and shape can be laid out like this and this machine has a fast
/// path for it: Q4_0, Q4_1, Q8_0 and BF16, a multiple of 64 rows and of 32 columns, AVX-512 with
/// VNNI and bfloat16.
bool has_columns(DType dtype, std::int64_t rows, std::int64_t cols);

/// has_columns(dtype, rows, …).
ColumnLayout column_layout(DType dtype, std::int64_t rows);

/// Bytes of all units of w.
inline std::int64_t columns_bytes(const WeightView& w) {
  return w.cols / 32 * column_layout(w.dtype, w.rows).unit_bytes();
}

/// Writes units `range` of w to their place in `columns` (columns_bytes(w) bytes, 64-byte aligned).
/// Reads w.data alone.
void pack_columns(const WeightView& w, Range range, std::byte* columns);

}  // namespace moesaic::kernels
