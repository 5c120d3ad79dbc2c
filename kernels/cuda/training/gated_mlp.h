#pragma once

#include <cstdint>

#include "kernels/activation.h"
#include "kernels/base/view.h"
#include "kernels/cuda/base/stream.h"

namespace moesaic::cuda {

/// A vector of thresholds in device memory times a factor; null: nothing is left out.
struct Threshold {
  const float* given = nullptr;
  float factor = 1;
};

/// Entries that tokens kept, added up in device memory; whole numbers, so in any order.
using Count = unsigned long long;

/// The inputs of a self-routed layer as operands: all, and x̂, those with |x_j| >= θ_j, whose places
/// the mask keeps. Adds their number to `count`.
///   x [n, d] without gaps; all, large, mask [n, d]. Throws ShapeError.
void keep_large(ConstMatrix x, const Threshold& threshold, std::uint16_t* all, std::uint16_t* large,
                std::uint8_t* mask, Count* count, StreamHandle stream);

/// What the neurons of a gated MLP leave for the products behind them and for the way back, from
/// the products g = W_gate x̂ and u = W_up x:
///   a = φ(g), kept where |a| >= θ_gate and |a u| >= θ_hidden
///   h = a u,  slope_gate = ∂h/∂g = φ'(g) u,  slope_up = ∂h/∂u = a   (0 where not kept)
/// Adds the numbers of routed (the first condition) and kept ones to counts[0] and [1], unless it
/// is null.   gate, up [n, d_ff] without gaps; h, slope_gate, slope_up [n, d_ff] bfloat16. Throws
/// ShapeError.
void keep_neurons(kernels::Activation phi, ConstMatrix gate, ConstMatrix up,
                  const Threshold& gate_threshold, const Threshold& hidden_threshold,
                  std::uint16_t* h, std::uint16_t* slope_gate, std::uint16_t* slope_up,
                  Count* counts, StreamHandle stream);

/// The slopes become the gradients of the two products: each times dh = ∂L/∂h.   all [n]
void scale_slopes(const float* dh, std::int64_t n, std::uint16_t* slope_gate,
                  std::uint16_t* slope_up, StreamHandle stream);
void scale_slopes(const float* dh, std::int64_t n, float* slope_gate, float* slope_up,
                  StreamHandle stream);

/// dx = 0 where the mask is.   dx, mask [n]
void mask_gradient(const std::uint8_t* mask, std::int64_t n, float* dx, StreamHandle stream);

}  // namespace moesaic::cuda
