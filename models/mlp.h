#pragma once

#include <cstdint>
#include <span>
#include <variant>

#include "kernels/activation.h"
#include "kernels/base/context.h"
#include "kernels/linear.h"
#include "kernels/mixture.h"
#include "kernels/secret_moe.h"
#include "kernels/self_routed.h"

namespace moesaic::models {

/// The gated MLP of a checkpoint:  y = W_down (φ(W_gate x) ⊙ (W_up x)).
struct DenseMlp {
  kernels::Activation phi = kernels::Activation::Silu;
  WeightView w_gate;  // [d_ff, d_model]
  WeightView w_up;    // [d_ff, d_model]
  WeightView w_down;  // [d_model, d_ff]
};

/// The MLP of one layer, in one of its forms. Weights are borrowed.
using Mlp =
    std::variant<DenseMlp, kernels::SecretMoeView, kernels::SelfRoutedView, kernels::MixtureView>;

/// y = mlp(f(x)), f being the input's norm where it has one.   x, y [n_tokens, d_model], distinct
/// memory. `selected`: empty, or [n_tokens, n_selected()] as in kernels::secret_moe and
/// kernels::mixture. `next`: what the product after the layer reads (kernels::read_ahead). Returns
/// the multiply-adds of all tokens, by the layer's description and whichever path ran.
std::int64_t mlp_forward(Context& ctx, const Mlp& mlp, const kernels::LinearInput& input, Matrix y,
                         std::span<std::int32_t> selected = {}, const kernels::Upcoming& next = {});

/// What the first product of the layer reads.
kernels::Upcoming first_weights(const Mlp& mlp);

/// Experts that a router selects per token; 0 for layers without one.
std::int64_t n_selected(const Mlp& mlp);

/// Multiply-adds per token of the layer: 3 · d_model · d_ff for the dense form; router, bypass,
/// shared and selected neurons, and the gate, of layers with a router; the mean over the
/// calibration text for a self-routed layer.
std::int64_t multiply_adds(const Mlp& mlp);

}  // namespace moesaic::models
