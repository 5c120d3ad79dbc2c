#pragma once

#include "kernels/cuda/base/row_stream.cuh"

namespace moesaic::cuda {

/// w · x of a row in the file's format by a warp, in all lanes. `staged`: kSharedBytes of
/// RowStream.
template <class Format>
__device__ float row_times(const WeightBytes& w, std::int64_t row, const float* x,
                           std::int64_t cols, std::uint8_t* staged, int lane) {
  float sum = 0;
  RowStream<Format>::run(w, row * (cols / Format::kElems * Format::kBytes), cols, staged, lane,
                         [&](std::int64_t c, std::int64_t left, const float(&values)[8]) {
                           for (int v = 0; v < Format::kVectors; ++v) {
                             const int at = Format::column(lane, v);
                             float xs[Format::kWidth];
                             load_floats<Format::kWidth>(x + c + at, left - at, xs);
                             for (int i = 0; i < Format::kWidth; ++i) {
                               sum = fmaf(values[Format::kWidth * v + i], xs[i], sum);
                             }
                           }
                         });
  return warp_sum(sum);
}

}  // namespace moesaic::cuda
