#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/base/view.h"

namespace moesaic::cuda {

inline constexpr int kColumnRows = 64;  // of a panel
inline constexpr int kColumnUnit = 32;  // columns that share scales
inline constexpr int kColumnLanes = 8;  // that share a column; each has eight of its rows

/// The order in which a GPU reads single columns of a matrix [rows, cols], for products with
/// vectors of which few entries count. Made at load time, in place of the file's rows; every code
/// and every scale is the file's own, only moved. Panels of 64 rows (the last filled up with zeros)
/// one after the other, in each of them units of 32 columns, in each of them
///
/// - the scales of the 64 rows: d in float16, in Q4_1 d and m side by side; nothing in F32, F16 and
///   BF16;
/// - column by column the codes of the 64 rows, in order; in Q4_* words of 32 bits, nibble i of
/// word
///   l being row 4 l + i, nibble 4 + i row 32 + 4 l + i.
///
/// A column of a panel is so a run of 32 bytes or a multiple, on such an address: what DRAM moves.
struct ColumnPanels {
  std::int64_t n_panels = 0;
  std::int64_t n_units = 0;       // of a panel
  std::int64_t scale_bytes = 0;   // of a unit
  std::int64_t column_bytes = 0;  // codes of one column
  std::int64_t unit_bytes() const { return scale_bytes + kColumnUnit * column_bytes; }
  std::int64_t bytes() const { return n_panels * n_units * unit_bytes(); }
};

/// True if matrices of this format can be laid out like this: F32, F16, BF16, Q4_0, Q4_1, Q8_0.
bool has_column_panels(DType dtype);

/// has_column_panels(w.dtype).
ColumnPanels column_panels(const WeightView& w);

/// Writes w, whose rows are in the host's memory, to column_panels(w).bytes() bytes there.
void pack_column_panels(const WeightView& w, std::byte* to);

}  // namespace moesaic::cuda
