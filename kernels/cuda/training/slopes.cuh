#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/activation.h"

namespace moesaic::cuda {

/// Elements of what products read, float32 or bfloat16 as bits.
__device__ inline void store(float v, float* to) { *to = v; }
__device__ inline void store(float v, std::uint16_t* to) {
  *to = __bfloat16_as_ushort(__float2bfloat16_rn(v));
}
__device__ inline float value_of(float v) { return v; }
__device__ inline float value_of(std::uint16_t bits) {
  return __uint_as_float(static_cast<std::uint32_t>(bits) << 16);
}

/// φ(x) and φ'(x) = σ(z) + x z' σ(z)(1 − σ(z)), the last factor as e/(1 + e)²: no cancellation. e
/// is 0 beyond ±100 on both sides.
__device__ inline void value_and_slope(kernels::Activation phi, float x, float* value,
                                       float* slope) {
  const float bounded = x < -100.0f ? -100.0f : x;  // a NaN stays one
  const float inner = bounded > 100.0f ? 100.0f : bounded;
  float z = inner, z_slope = 1;
  if (phi == kernels::Activation::GeluTanh) {
    const float square = inner * inner;
    z = inner * (1.5957691216057308f + 0.07135481627260025f * square);
    z_slope = 1.5957691216057308f + 3 * 0.07135481627260025f * square;
  }
  const float e = expf(-fabsf(z));
  const float inverse = 1.0f / (1.0f + e);
  const float sigma = (z < 0 ? e : 1.0f) * inverse;
  *value = bounded * sigma;
  *slope = sigma + inner * z_slope * (e * (inverse * inverse));
}

}  // namespace moesaic::cuda
