#pragma once

#include <cstdint>

#include "kernels/cuda/base/stream.h"

namespace moesaic::cuda {

/// Gradients of the scales and offsets of blocks of 32 weights w_i = s c_i + o, from the weights':
///   ∂L/∂s = Σ_i c_i ∂L/∂w_i, ∂L/∂o = Σ_i ∂L/∂w_i
/// codes, gradient [32 n]; scale, offset [n], overwritten; offset may be null.
void gather_scales(const std::int8_t* codes, const float* gradient, std::int64_t n, float* scale,
                   float* offset, StreamHandle stream);

/// The weights as their scales and offsets (null: 0) stand.   weights [32 n]
void scatter_scales(const std::int8_t* codes, const float* scale, const float* offset,
                    std::int64_t n, float* weights, StreamHandle stream);

}  // namespace moesaic::cuda
