#pragma once

#include <span>

#include "kernels/base/view.h"
#include "kernels/cuda/base/stream.h"

namespace moesaic::cuda {

/// Y = X Wᵀ + b, or Y += X Wᵀ + b.   x [n_tokens, w.cols], w [rows, cols] of any DType in the
/// file's rows, bias [rows] or null, y [n_tokens, rows]; all in device memory.
struct Product {
  WeightView w;
  ConstMatrix x;
  const float* bias = nullptr;
  Matrix y;
  bool accumulate = false;
};

inline constexpr int kMaxProducts = 4;

/// Up to kMaxProducts of them, for one token or a few: a warp reads a row of W once and multiplies
/// it with up to 8 tokens; products of one dtype are one launch. All have the same number of
/// tokens. A value depends on its row and token alone: float32 sums in an order that the row's
/// length gives. W without rows: nothing. No Y may overlap an X. Throws ShapeError.
void linear(std::span<const Product> products, StreamHandle stream);

inline void linear(const Product& product, StreamHandle stream) { linear({&product, 1}, stream); }

}  // namespace moesaic::cuda
