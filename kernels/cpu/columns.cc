#include "kernels/columns.h"

#include <cstring>

#include "kernels/cpu/block_codes.h"
#include "kernels/neurons.h"

namespace moesaic::kernels {
namespace {

using Byte = std::uint8_t;

void pack_bf16_unit(const WeightView& w, std::int64_t unit, Byte* to) {
  for (std::int64_t r = 0; r < w.rows; ++r) {
    const std::int64_t in = r % 32;
    const std::int64_t at = r - in + in % 16 / 4 * 8 + in / 16 * 4 + in % 4;
    const std::byte* from = w.row(r) + 64 * unit;
    for (std::int64_t c = 0; c < 32; ++c) std::memcpy(to + 2 * (c * w.rows + at), from + 2 * c, 2);
  }
}

}  // namespace

bool has_columns(DType dtype, std::int64_t rows, std::int64_t cols) {
  // The same formats, multiples and instructions as single neurons whose down rows they are.
  return has_neurons(dtype, rows) && cols > 0 && cols % 32 == 0;
}

ColumnLayout column_layout(DType dtype, std::int64_t rows) {
  switch (dtype) {
    case DType::Q4_0:
      return {.scale_bytes = 2 * rows, .column_bytes = rows / 2};
    case DType::Q4_1:
      return {.scale_bytes = 4 * rows, .column_bytes = rows / 2};
    case DType::Q8_0:
      return {.scale_bytes = 2 * rows, .column_bytes = rows};
    case DType::BF16:
      return {.scale_bytes = 0, .column_bytes = 2 * rows};
    default:
      return {};  // no columns
  }
}

void pack_columns(const WeightView& w, Range range, std::byte* columns) {
  const ColumnLayout layout = column_layout(w.dtype, w.rows);
  const DTypeTraits& t = traits(w.dtype);
  for (std::int64_t u = range.begin; u < range.end; ++u) {
    Byte* to = reinterpret_cast<Byte*>(columns) + u * layout.unit_bytes();
    if (w.dtype == DType::BF16) {
      pack_bf16_unit(w, u, to);
      continue;
    }
    for (std::int64_t first = 0; first < w.rows; first += 32) {
      Byte codes[32][32];  // [row][column]
      for (std::int64_t r = 0; r < 32; ++r) {
        const auto* row = reinterpret_cast<const Byte*>(w.row(first + r));
        unit_codes(w.dtype, row, u, codes[r]);
        const Byte* block = row + u * t.block_bytes;
        std::memcpy(to + 2 * (first + r), block, 2);
        if (w.dtype == DType::Q4_1) std::memcpy(to + 2 * (w.rows + first + r), block + 2, 2);
      }
      for (std::int64_t c = 0; c < 32; ++c) {
        Byte column[32];
        for (int r = 0; r < 32; ++r) column[r] = codes[r][c];
        crosswise_codes(w.dtype, column, first, w.rows,
                        to + layout.scale_bytes + c * layout.column_bytes);
      }
    }
  }
}

}  // namespace moesaic::kernels
