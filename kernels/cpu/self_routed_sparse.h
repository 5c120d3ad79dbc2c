#pragma once

#include <cstdint>

#include "kernels/self_routed.h"

namespace moesaic::kernels {

/// self_routed() by single columns and rows, with Q16 and the layer's packed weights. One fork, in
/// which threads meet once: each has a range of neurons from their gate to their down columns. A
/// token's gate is that of the dense path bit for bit; the rest agrees up to float32 summation
/// order. Shapes are checked before.
std::int64_t self_routed_sparse(Context& ctx, const SelfRoutedView& layer, const LinearInput& input,
                                Matrix y);

/// What a token costs on the sparse path, by the layer's shares, in bytes that the dense path would
/// read in the same time.
double sparse_cost(const SelfRoutedView& layer);

}  // namespace moesaic::kernels
