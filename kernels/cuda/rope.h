#pragma once

#include <cstdint>

#include "kernels/base/view.h"
#include "kernels/cuda/base/stream.h"
#include "kernels/rope.h"

namespace moesaic::cuda {

/// Rotates pair i of each head of row t by the angle positions[t] · freq[i], as kernels::rope.
/// x [n_tokens, n_heads · head_dim] in place; positions [n_tokens]; freq [head_dim / 2]; all in
/// device memory. Throws ShapeError. Source: Su et al. 2021 (RoFormer).
void rope(Matrix x, int head_dim, const std::int32_t* positions, const float* freq,
          kernels::RopeStyle style, StreamHandle stream);

}  // namespace moesaic::cuda
