#include "kernels/cuda/base/column_panels.h"

#include <algorithm>
#include <cstring>

#include "kernels/base/error.h"
#include "kernels/cpu/block_codes.h"

namespace moesaic::cuda {
namespace {

using Byte = std::uint8_t;

// Bytes of a row's scales in a unit, and of 64 codes.
struct Sizes {
  std::int64_t scales, codes;
};

Sizes sizes(DType dtype) {
  switch (dtype) {
    case DType::F32:
      return {0, 256};
    case DType::F16:
    case DType::BF16:
      return {0, 128};
    case DType::Q8_0:
      return {2, 64};
    case DType::Q4_0:
      return {2, 32};
    case DType::Q4_1:
      return {4, 32};
    default:
      return {0, 0};
  }
}

// Row r of a panel, its code in a column's 64.
void put_code(DType dtype, std::int64_t r, Byte code, Byte* column) {
  if (dtype == DType::Q8_0) {
    column[r] = code ^ 0x80;  // signed again
    return;
  }
  const std::int64_t nibble = r / 32 * 4 + r % 4;
  column[4 * (r % 32 / 4) + nibble / 2] |= static_cast<Byte>(code << nibble % 2 * 4);
}

}  // namespace

bool has_column_panels(DType dtype) { return sizes(dtype).codes > 0; }

ColumnPanels column_panels(const WeightView& w) {
  const Sizes s = sizes(w.dtype);
  require<ShapeError>(s.codes > 0, "column panels: {} has none", traits(w.dtype).name);
  return {.n_panels = (w.rows + kColumnRows - 1) / kColumnRows,
          .n_units = (w.cols + kColumnUnit - 1) / kColumnUnit,
          .scale_bytes = kColumnRows * s.scales,
          .column_bytes = s.codes};
}

void pack_column_panels(const WeightView& w, std::byte* to) {
  const ColumnPanels layout = column_panels(w);
  const Sizes s = sizes(w.dtype);
  std::fill_n(to, layout.bytes(), std::byte{0});
  const std::int64_t block_bytes = traits(w.dtype).block_bytes;
  for (std::int64_t row = 0; row < w.rows; ++row) {
    const std::int64_t panel = row / kColumnRows, r = row % kColumnRows;
    const auto* from = reinterpret_cast<const Byte*>(w.row(row));
    auto* unit = reinterpret_cast<Byte*>(to) + panel * layout.n_units * layout.unit_bytes();
    for (std::int64_t u = 0; u < layout.n_units; ++u, unit += layout.unit_bytes()) {
      Byte* columns = unit + layout.scale_bytes;
      if (s.scales > 0) {
        // A block begins with its scales.
        std::memcpy(unit + r * s.scales, from + u * block_bytes,
                    static_cast<std::size_t>(s.scales));
        Byte codes[kColumnUnit];
        kernels::unit_codes(w.dtype, from, u, codes);
        for (int c = 0; c < kColumnUnit; ++c) {
          put_code(w.dtype, r, codes[c], columns + c * layout.column_bytes);
        }
        continue;
      }
      const std::int64_t n = std::min<std::int64_t>(kColumnUnit, w.cols - u * kColumnUnit);
      for (std::int64_t c = 0; c < n; ++c) {
        std::memcpy(columns + c * layout.column_bytes + r * block_bytes,
                    from + (u * kColumnUnit + c) * block_bytes,
                    static_cast<std::size_t>(block_bytes));
      }
    }
  }
}

}  // namespace moesaic::cuda
