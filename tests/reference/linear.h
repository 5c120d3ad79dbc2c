#pragma once

#include <cstdint>
#include <vector>

#include "kernels/base/view.h"

namespace moesaic::reference {

/// The weights as float32, [rows, cols], by kernels::dequantize_row.
std::vector<float> unpack(const WeightView& w);

/// X Wᵀ in double, and what its rounding errors scale with.
struct Product {
  std::vector<double> value;      // [n_tokens, rows]
  std::vector<double> magnitude;  // [n_tokens, rows], Σ |w x|
};
Product linear(const WeightView& w, ConstMatrix x);

/// alpha op(A) op(B) + beta C.
Product gemm(bool trans_a, bool trans_b, double alpha, ConstMatrix a, ConstMatrix b, double beta,
             ConstMatrix c);

}  // namespace moesaic::reference
