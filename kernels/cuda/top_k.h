#pragma once

#include <cstdint>

#include "kernels/base/view.h"
#include "kernels/cuda/base/stream.h"

namespace moesaic::cuda {

/// Per row, indices of the k largest scores, in ascending index order, as kernels::top_k: ties pick
/// the lower index, NaN counts as −∞.   scores [n_rows, n], ids [n_rows, k] packed, in device
/// memory; 0 <= k <= n. By threshold: a radix search for the k-th largest key, then one pass that
/// collects. Throws ShapeError.
void top_k(ConstMatrix scores, std::int64_t k, std::int32_t* ids, StreamHandle stream);

/// y_t = softmax(x_t), the maximum subtracted.   x, y [n_rows, n] (may be the same memory) in
/// device memory. A row with a NaN becomes NaN. Throws ShapeError.
void softmax(ConstMatrix x, Matrix y, StreamHandle stream);

}  // namespace moesaic::cuda
