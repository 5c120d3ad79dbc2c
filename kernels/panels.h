#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/base/thread_pool.h"
#include "kernels/base/view.h"

namespace moesaic::kernels {

/// The order in which fast products read weights: panels of 16 rows, each a strip of units of 32
/// columns, so that one 64-byte load holds the same four columns (two, in bfloat16) of all 16 rows
/// and a lane never has to be summed across. Made at load time; every code and every scale is the
/// file's own, only moved.
///
///   Q8_0                 unit: 8 groups of [16 rows][4 columns] bytes, code + 128
///   Q4_0, Q4_1, Q4_K     unit: 4 groups of bytes, column c in the low nibble, 16 + c in the high
///   Q5_0, Q5_1, Q5_K     the same, then 8 words of 64 fifth bits, one per group of columns
///   Q6_K                 the same, then 2 × 64 bytes, four pairs of upper bits in each
///   BF16                 unit: 16 groups of [16 rows][2 columns]
///
/// Units come in strips behind a header with their scales, so that a panel is one stream. Q*_1:
/// strips of one unit, d[16] and m[16] in float16; Q*_0: of two, d[16] of each. Q4_K, Q5_K: of
/// eight, d[16] and d_min[16], then per unit the six-bit scales [16] and minima [16] as bytes;
/// Q6_K: of eight, d[16], then per 16 columns scales [16]. BF16: no header. A last strip may be
/// shorter.
struct PanelLayout {
  std::int64_t n_units = 0;       // per panel
  std::int64_t strip_units = 1;   // per strip
  std::int64_t header_bytes = 0;  // of a strip, a multiple of 64
  std::int64_t unit_bytes = 0;    // codes of one unit
  std::int64_t panel_bytes() const {
    return (n_units + strip_units - 1) / strip_units * header_bytes + n_units * unit_bytes;
  }
  /// Where the codes of unit u stand in a panel.
  std::int64_t unit_offset(std::int64_t u) const {
    return (u / strip_units + 1) * header_bytes + u * unit_bytes;
  }
  /// Where the header of unit u's strip stands.
  std::int64_t header_offset(std::int64_t u) const {
    return u / strip_units * (header_bytes + strip_units * unit_bytes);
  }
};

inline constexpr std::int64_t kPanelRows = 16;
inline constexpr std::int64_t kUnitColumns = 32;

/// True if rows of this format and length can be laid out in panels: the quantised formats and
/// BF16, a multiple of 32 columns and of the format's block.
bool has_panels(DType dtype, std::int64_t cols);

/// Layout of one panel; has_panels(dtype, cols).
PanelLayout panel_layout(DType dtype, std::int64_t cols);

/// Panels of w.
inline std::int64_t n_panels(const WeightView& w) { return (w.rows + kPanelRows - 1) / kPanelRows; }

/// Bytes of all panels of w; a last panel that is not full is filled with zeros.
std::int64_t panel_bytes(const WeightView& w);

/// Writes panels `range` of w to their place in `panels` (panel_bytes(w) bytes, 64-byte aligned).
/// Reads w.data alone.
void pack_panels(const WeightView& w, Range range, std::byte* panels);

}  // namespace moesaic::kernels
