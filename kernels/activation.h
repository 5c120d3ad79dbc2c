#pragma once

#include <span>

#include "kernels/base/context.h"
#include "kernels/base/view.h"

namespace moesaic::kernels {

/// φ of a gated MLP.
enum class Activation {
  Silu,      // x / (1 + e^−x): Llama
  GeluTanh,  // ½x(1 + tanh(√(2/π)(x + 0.044715x³))): Gemma
};

/// φ(x) of one element, the definition that the vector kernels are tested against.
float activate(Activation phi, float x);

/// h = φ(gate) ⊙ up.   gate, up, h [n_tokens, d_ff]; h may be gate or up. Throws ShapeError.
void gated_activation(Context& ctx, Activation phi, ConstMatrix gate, ConstMatrix up, Matrix h);

/// value = φ(x), as gated_activation() computes it; on the calling thread. Both of one length;
/// value may be x. Throws ShapeError.
void activation(Activation phi, std::span<const float> x, std::span<float> value);

/// value = φ(x), slope = φ'(x), for a backward pass; on the calling thread. All of one length;
/// value or slope may be x. Throws ShapeError.
void activation_slope(Activation phi, std::span<const float> x, std::span<float> value,
                      std::span<float> slope);

}  // namespace moesaic::kernels
