#pragma once

#include "kernels/base/context.h"
#include "kernels/base/view.h"

namespace moesaic::kernels {

/// Y = X Wᵀ, or Y += X Wᵀ.   X [n_tokens, cols] f32, W [rows, cols] any DType, Y [n_tokens, rows]
/// f32. Few tokens: each row of W is read once and multiplied with all of them while it is in
/// registers; many tokens: tiles of W are unpacked once and multiplied by oneDNN. Row r of Y
/// depends on the number of tokens only through float32 summation order. Deterministic for a given
/// thread count. With Activations::BF16 in the context X is rounded to bfloat16 first, and W too
/// where it goes through tiles. Counts W's bytes under `traffic`. Throws ShapeError.
void linear(Context& ctx, const WeightView& w, ConstMatrix x, Matrix y, Traffic traffic,
            bool accumulate = false);

/// dst[i] = bf16(src[i]) as float32: how an activation enters a product under Activations::BF16.
void round_to_bf16(std::span<const float> src, std::span<float> dst);

/// C = alpha op(A) op(B) + beta C, float32 row-major, on all threads of ctx (C is split by rows,
/// or by columns if it is wider than high). For the converter, whose operands are plain float32. op
/// is transposition where the flag is set. With beta = 0, what C held does not matter.
/// A [m, k] (or [k, m] if trans_a), B [k, n] (or [n, k] if trans_b), C [m, n]. Throws ShapeError.
/// With Activations::BF16 in the context, A and B are rounded to bfloat16, sums stay float32.
void gemm(Context& ctx, bool trans_a, bool trans_b, float alpha, ConstMatrix a, ConstMatrix b,
          float beta, Matrix c);

}  // namespace moesaic::kernels
