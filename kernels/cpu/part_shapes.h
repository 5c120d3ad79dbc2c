#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "kernels/base/error.h"
#include "kernels/base/view.h"

namespace moesaic::kernels {

/// Checks of the parts of one kind of layer. Both throw ShapeError("LAYER: PART …") that tells what
/// was found and expected.
struct PartShapes {
  std::string_view layer;

  /// w is [rows, cols], its rows whole blocks of its format.
  void weight(std::string_view part, const WeightView& w, std::int64_t rows,
              std::int64_t cols) const {
    require<ShapeError>(w.rows == rows && w.cols == cols, "{}: {} is [{}, {}], expected [{}, {}]",
                        layer, part, w.rows, w.cols, rows, cols);
    const DTypeTraits& t = traits(w.dtype);
    require<ShapeError>(cols % t.block_elems == 0,
                        "{}: {} has rows of {} {} elements, expected a multiple of {}", layer, part,
                        cols, t.name, t.block_elems);
  }

  void length(std::string_view part, std::size_t found, std::int64_t expected) const {
    require<ShapeError>(found == static_cast<std::size_t>(expected),
                        "{}: {} has {} elements, expected {}", layer, part, found, expected);
  }
};

}  // namespace moesaic::kernels
