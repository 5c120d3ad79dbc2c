#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/base/stream.h"

namespace moesaic::cuda {

/// Doubles that square_sum() needs as workspace, whatever n is.
inline constexpr std::int64_t kSquareSumParts = 256;

/// *square = Σ g², in double, always in one order.   g [n]; workspace [kSquareSumParts]
void square_sum(const float* g, std::int64_t n, double* workspace, double* square,
                StreamHandle stream);

/// What a step takes gradients times: scale[0], those of the first n_clipped tensors,
/// min(1, clip / ‖g‖) with ‖g‖² = Σ of their squares, 1 for a clip of 0; scale[1], the others', 1.
/// Both are NaN, so that no step is taken, where any square is NaN or infinite.   squares [n],
/// scale [2]
void clip_scale(const double* squares, std::int64_t n_clipped, std::int64_t n, double clip,
                float* scale, StreamHandle stream);

/// Of one step of Adam (β 0.9/0.999, ε 1e-8): both corrections, 1 / (1 − βᵗ), and the rate.
struct AdamStep {
  float correction1 = 1;
  float correction2 = 1;
  float rate = 0;
};

/// value −= rate · m̂ / (√v̂ + ε), the gradient taken times *scale; then the gradient is zero for the
/// next step. Where *scale is NaN all stays as it is.   value, gradient, m, v [n]
void adam(const AdamStep& step, const float* scale, std::int64_t n, float* value, float* gradient,
          float* m, float* v, StreamHandle stream);

}  // namespace moesaic::cuda
