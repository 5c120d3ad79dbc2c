#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "kernels/activation.h"
#include "kernels/base/context.h"
#include "kernels/base/view.h"

namespace moesaic::kernels {

/// Y = X Wᵀ, or Y += X Wᵀ.   X [n_tokens, cols] f32, W [rows, cols] any DType, Y [n_tokens, rows]
/// f32. Few tokens: each row of W is read once and multiplied with all of them while it is in
/// registers; many tokens: tiles of W are unpacked once and multiplied by oneDNN. Row r of Y
/// depends on the number of tokens only through float32 summation order. Deterministic for a given
/// thread count. With Activations::BF16 in the context X is rounded to bfloat16 first, and W too
/// where it goes through tiles; with Activations::Q16 and panels of W (kernels/panels.h) X enters
/// as described there and what one (row, token) pair gets depends on nothing else. Counts W's bytes
/// under `traffic`. Throws ShapeError.
void linear(Context& ctx, const WeightView& w, ConstMatrix x, Matrix y, Traffic traffic,
            bool accumulate = false);

/// What several products share: X, or X normed row by row (rms_norm) where `norm` is not empty.
struct LinearInput {
  ConstMatrix x;                     // [n_tokens, cols]
  std::span<const float> norm = {};  // [cols] or empty
  float eps = 0;
};

/// X, or its norm in the context's workspace, taken there.
ConstMatrix normed(Context& ctx, const LinearInput& input);

/// One of them: Y = f(X) Wᵀ, or Y += f(X) Wᵀ. W without rows: nothing.
struct LinearOutput {
  WeightView w;
  Matrix y;
  bool accumulate = false;
};

/// linear() for each output. With Activations::Q16 and panels X is normed and quantised once, and
/// the threads meet once for all products. Y may not overlap X. Throws ShapeError.
void linear_group(Context& ctx, const LinearInput& input, std::span<const LinearOutput> outputs,
                  Traffic traffic);

/// H = φ(f(X) W_gateᵀ) ⊙ (f(X) W_upᵀ).   W_gate and W_up of the same shape [d_ff, cols],
/// H [n_tokens, d_ff]. Otherwise as linear_group().
void gated_linear(Context& ctx, const LinearInput& input, Activation phi, const WeightView& w_gate,
                  const WeightView& w_up, Matrix h, Traffic traffic);

/// The weights of a product that is to come: one linear_group(), or one gated_linear().
struct Upcoming {
  std::array<WeightView, 3> weights;  // in the order of the call; without rows: nothing
  bool gated = false;
};

/// A hint, given before a product, about the one after it: threads that have to wait in between
/// fetch the beginning of their share of its panels into their caches. Changes no result.
void read_ahead(Context& ctx, const Upcoming& upcoming);

/// dst[i] = bf16(src[i]) as float32: how an activation enters a product under Activations::BF16.
void round_to_bf16(std::span<const float> src, std::span<float> dst);

/// C = alpha op(A) op(B) + beta C, float32 row-major, on all threads of ctx (C is split by rows,
/// or by columns if it is wider than high). For the converter, whose operands are plain float32. op
/// is transposition where the flag is set. With beta = 0, what C held does not matter.
/// A [m, k] (or [k, m] if trans_a), B [k, n] (or [n, k] if trans_b), C [m, n]. Throws ShapeError.
/// With Activations::BF16 in the context, A and B are rounded to bfloat16, sums stay float32. Where
/// the context has `products`, it runs there if they take it, with the same roundings.
void gemm(Context& ctx, bool trans_a, bool trans_b, float alpha, ConstMatrix a, ConstMatrix b,
          float beta, Matrix c);

/// The same with operands that are raw bfloat16 already; sums float32.
void gemm(Context& ctx, bool trans_a, bool trans_b, float alpha, MatrixView<const std::uint16_t> a,
          MatrixView<const std::uint16_t> b, float beta, Matrix c);

/// The same in float32 on the calling thread alone, for work that is split over threads by other
/// borders than one product's.
void gemm_on_this_thread(bool trans_a, bool trans_b, float alpha, ConstMatrix a, ConstMatrix b,
                         float beta, Matrix c);

/// dst[i] = the raw bfloat16 of src[i], nearest even; on the calling thread. Throws ShapeError.
void to_bf16(std::span<const float> src, std::span<std::uint16_t> dst);

}  // namespace moesaic::kernels
