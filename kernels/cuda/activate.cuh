#pragma once

#include "kernels/activation.h"

namespace moesaic::cuda {

/// φ(x) of kernels/activation.h: x / (1 + e^−z), z = x (Silu) or 2√(2/π)(x + 0.044715x³)
/// (GeluTanh). The exponent is never positive; beyond −1e4 the result is 0 anyway, and −∞ gives no
/// NaN.
__device__ inline float phi_of(kernels::Activation phi, float x) {
  float z = x;
  if (phi == kernels::Activation::GeluTanh) {
    z = x * (1.5957691216057308f + 0.07135481627260025f * x * x);
  }
  const float e = expf(-fabsf(z));
  const float bounded = x < -1e4f ? -1e4f : x;
  return bounded * ((z < 0 ? e : 1.0f) / (1.0f + e));
}

}  // namespace moesaic::cuda
