#pragma once

#include <cstdint>
#include <span>

#include "kernels/base/view.h"

namespace moesaic::kernels {

/// dots[e] = a · M[rows[e]].   a [cols], M [n, cols], rows and dots of one length, each row in
/// [0, n) (not checked). On the calling thread, float32. Throws ShapeError.
void gathered_dots(std::span<const float> a, ConstMatrix m, std::span<const std::int32_t> rows,
                   std::span<float> dots);

/// sum = Σ_e scale[e] M[rows[e]], or sum += with `accumulate`, in the order of `rows`.
/// sum [cols], M [n, cols], rows and scale of one length, each row in [0, n) (not checked). On the
/// calling thread, float32. Throws ShapeError.
void gathered_sum(std::span<const float> scale, ConstMatrix m, std::span<const std::int32_t> rows,
                  std::span<float> sum, bool accumulate);

}  // namespace moesaic::kernels
