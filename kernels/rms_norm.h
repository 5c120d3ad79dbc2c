#pragma once

#include <span>

#include "kernels/base/context.h"
#include "kernels/base/view.h"

namespace moesaic::kernels {

/// y_t = x_t / sqrt(mean(x_t²) + eps) ⊙ weight, per row.   x, y [n_rows, d] (may be the same
/// memory), weight [d]. Throws ShapeError. Source: Zhang & Sennrich 2019; eps inside the root as in
/// Llama.
void rms_norm(Context& ctx, ConstMatrix x, std::span<const float> weight, float eps, Matrix y);

/// x += y.   x, y [n_rows, d]. Throws ShapeError.
void add(Context& ctx, ConstMatrix y, Matrix x);

}  // namespace moesaic::kernels
