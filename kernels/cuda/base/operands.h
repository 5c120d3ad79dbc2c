#pragma once

#include <cstdint>
#include <string_view>

#include "kernels/base/error.h"
#include "kernels/base/view.h"

namespace moesaic::cuda {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Floats from one row of n to the next, so that all begin at multiples of 16 bytes.
inline std::int64_t aligned_floats(std::int64_t n) { return (n + 3) / 4 * 4; }

/// Throws ShapeError unless every row of m begins at a multiple of 16 bytes, as vector loads want
/// it.
inline void require_aligned_rows(std::string_view op, ConstMatrix m) {
  require<ShapeError>(
      reinterpret_cast<std::uintptr_t>(m.data) % 16 == 0 && (m.rows <= 1 || m.stride % 4 == 0),
      "{}: rows of {} floats, {} apart, at {}, expected to begin at multiples of "
      "16 bytes",
      op, m.cols, m.stride, static_cast<const void*>(m.data));
}

/// Throws ShapeError unless w holds whole blocks and begins at a multiple of 32 bytes, a sector.
inline void require_weights(std::string_view op, const WeightView& w) {
  const DTypeTraits& t = traits(w.dtype);
  require<ShapeError>(w.cols % t.block_elems == 0,
                      "{}: {} rows of {} elements, expected a multiple of {}", op, t.name, w.cols,
                      t.block_elems);
  require<ShapeError>(reinterpret_cast<std::uintptr_t>(w.data) % 32 == 0,
                      "{}: weights at {}, expected a multiple of 32 bytes", op,
                      static_cast<const void*>(w.data));
}

}  // namespace moesaic::cuda
