#pragma once

#include <cstdint>
#include <span>

#include "converter/linalg.h"
#include "converter/student.h"
#include "kernels/base/context.h"

namespace moesaic::converter {

/// One layer's calibration sample: what the MLP sees and what it should give, per token.
struct LayerSample {
  ConstMatrix x;                  // [n_tokens, d_model] MLP inputs
  ConstMatrix y;                  // [n_tokens, d_model] outputs wanted
  std::span<const float> weight;  // ω [n_tokens], mean 1
  std::int64_t n_fit = 0;         // rows [0, n_fit) are fitted, the rest are held out to judge

  LayerSample held_out() const;
};

/// Step 4, widened: given the selection of the student's router, the down rows of all neurons, the
/// bias and the rank-q bypass that together minimise
///   Σ_t ω_t ‖y_t − b − W_downᵀ φ_t − P Q x_t‖² + ridge ‖W_down − W_start‖²,
///   φ_t = shared activations and mask ⊙ (activations − μ),
/// in closed form: the joint normal equations over (φ, 1, x); φ and 1 are eliminated, x's part is
/// cut to rank q in the metric that is left (reduced-rank regression), then φ's part is solved for.
/// The unselected neurons' part of y is so taken over by bias, bypass and the neurons that run. The
/// down rows end on the grid of `down_dtype`, rounded jointly (rounding.h); F32: as they come out.
void fit_outputs(Context& ctx, Student& student, const LayerSample& sample, double bypass_ridge,
                 double ridge, DType down_dtype);

/// Lower Cholesky factor of Σ ω x xᵀ over (the first 65,536 of) the fitted rows, with a hundredth
/// of the mean diagonal added: the metric that gate and up rows are rounded in.   [d_model,
/// d_model]
DMatrix input_factor(Context& ctx, const LayerSample& sample);

/// Output of the student on rows of x: float32 weights, masked dense products.   x, y [m, d_model].
void student_forward(Context& ctx, const Student& student, ConstMatrix x, Matrix y);

/// Σ ω‖y − ŷ‖² / Σ ω‖y − ȳ‖² over a sample, ȳ its weighted mean; ŷ [n_tokens, d_model]. 0 where
/// ŷ = y throughout, NaN where y does not vary but ŷ misses it.
double relative_error(const LayerSample& sample, ConstMatrix y_hat);

}  // namespace moesaic::converter
