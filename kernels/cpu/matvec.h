#pragma once

#include "kernels/base/thread_pool.h"
#include "kernels/base/view.h"

namespace moesaic::kernels {

/// Y[:, rows] = X W[rows, :]ᵀ, or Y[:, rows] += …, on the calling thread, unpacking in registers.
/// What one (row, token) pair gets depends on neither the range nor the number of tokens. Shapes as
/// in linear(), unchecked; no rounding of X, no tally.
void matvec_rows(const WeightView& w, Range rows, ConstMatrix x, Matrix y, bool accumulate = false);

/// Throws ShapeError unless Y (+)= X Wᵀ fits: what linear() and linear_group() begin with.
void check_linear_shapes(const WeightView& w, ConstMatrix x, Matrix y);

}  // namespace moesaic::kernels
