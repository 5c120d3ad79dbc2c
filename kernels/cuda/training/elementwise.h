#pragma once

#include <cstdint>

#include "kernels/base/view.h"
#include "kernels/cuda/base/stream.h"

namespace moesaic::cuda {

/// Operands of products: n floats rounded to bfloat16, nearest even.   from, to [n]
void to_bf16(const float* from, std::int64_t n, std::uint16_t* to, StreamHandle stream);

/// to = from, within device memory.   [n]
void copy(const float* from, std::int64_t n, float* to, StreamHandle stream);

/// ∂L/∂x of rms_norm(), given dy = ∂L/∂y: with s = 1/√(mean(x²) + eps) and g = weight ⊙ dy,
///   dx = s g − s³ (g·x)/d x;   dx = …, or dx += … with `accumulate`.
/// dx may be dy. The weight stays as it is.   x, dy, dx [n, d], weight [d]. Throws ShapeError.
void rms_norm_backward(ConstMatrix x, const float* weight, float eps, ConstMatrix dy,
                       bool accumulate, Matrix dx, StreamHandle stream);

}  // namespace moesaic::cuda
