#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/base/context.h"
#include "kernels/base/view.h"

namespace moesaic::kernels {

/// Which two elements of a head rotate together.
enum class RopeStyle {
  Interleaved,  // (2i, 2i+1): Llama checkpoints in GGUF, whose q and k rows are permuted for it
  Halves,       // (i, i + head_dim/2): NeoX, Gemma, Qwen
};

/// Inverse frequencies base^(-2i/head_dim), i in [0, head_dim/2), in double, rounded once.
std::vector<float> rope_frequencies(int head_dim, double base);

/// Rotates pair i of each head of row t by the angle positions[t] · freq[i].
/// x [n_tokens, n_heads · head_dim] in place; positions [n_tokens]; freq [head_dim / 2]. Throws
/// ShapeError. Source: Su et al. 2021 (RoFormer).
void rope(Context& ctx, Matrix x, int head_dim, std::span<const std::int32_t> positions,
          std::span<const float> freq, RopeStyle style);

}  // namespace moesaic::kernels
