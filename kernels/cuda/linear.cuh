#pragma once

#include "kernels/cuda/base/row_stream.cuh"
#include "kernels/cuda/linear.h"

namespace moesaic::cuda {

/// One product of a launch, whose rows are `first_row` and following of all rows of the launch.
struct RowProduct {
  WeightBytes w;
  std::int64_t first_row;
  std::int64_t cols;
  const float* x;
  std::int64_t x_stride;
  const float* bias;
  float* y;
  std::int64_t y_stride;
  bool accumulate;
};

/// Products of one dtype and number of tokens.
struct RowProducts {
  RowProduct of[kMaxProducts];
  int n;
  std::int64_t rows;  // of all together
};

inline RowProduct row_product(const Product& p, std::int64_t first_row) {
  return {{reinterpret_cast<const std::uint8_t*>(p.w.data), p.w.bytes()},
          first_row,
          p.w.cols,
          p.x.data,
          p.x.stride,
          p.bias,
          p.y.data,
          p.y.stride,
          p.accumulate};
}

/// Row `row` of all rows with kTokens tokens from token `first` on, by one warp.
template <class Format, int kTokens>
__device__ void row_times_tokens(const RowProducts& all, std::int64_t row, std::int64_t first,
                                 std::uint8_t* shared, int lane) {
  int which = 0;
  while (which + 1 < all.n && row >= all.of[which + 1].first_row) ++which;
  const RowProduct& p = all.of[which];
  const std::int64_t r = row - p.first_row;
  const float* x = p.x + first * p.x_stride;
  float sum[kTokens] = {};
  RowStream<Format>::run(p.w, r * (p.cols / Format::kElems * Format::kBytes), p.cols, shared, lane,
                         [&](std::int64_t c, std::int64_t left, const float(&w)[8]) {
                           for (int t = 0; t < kTokens; ++t) {
                             for (int v = 0; v < Format::kVectors; ++v) {
                               const int at = Format::column(lane, v);
                               float xs[Format::kWidth];
                               load_floats<Format::kWidth>(x + t * p.x_stride + c + at, left - at,
                                                           xs);
                               for (int i = 0; i < Format::kWidth; ++i) {
                                 sum[t] = fmaf(w[Format::kWidth * v + i], xs[i], sum[t]);
                               }
                             }
                           }
                         });
  float mine = 0;
  for (int t = 0; t < kTokens; ++t) {
    const float total = warp_sum(sum[t]);
    if (lane == t) mine = total;
  }
  if (lane >= kTokens) return;
  if (p.bias != nullptr) mine += p.bias[r];
  float* y = p.y + (first + lane) * p.y_stride + r;
  *y = p.accumulate ? *y + mine : mine;
}

}  // namespace moesaic::cuda
