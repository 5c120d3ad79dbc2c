#pragma once

#include <cstdint>
#include <span>

#include "converter/recovery/arithmetic.h"

namespace moesaic::converter {

/// Distillation through the LM head W [vocab_size, d_model]:
///   L = unit · Σ_t KL(p_t ‖ q_t),  p_t = softmax(W h'_t), q_t = softmax(W h_t),
/// h' the teacher's and h the student's final normed hidden states. Returns Σ_t KL(p_t ‖ q_t) in
/// nats, of all rows; dh [n, d_model] = ∂L/∂h is overwritten, if asked for (data not null):
///   ∂L/∂h_t = unit · Wᵀ (q_t − p_t).
/// Logits exist for a tile of rows at a time (at most kHeadTileElements of each model): over whole
/// rows the log-sum-exps are known before the gradient, so that three products of the head's size
/// do, where tiles of the vocabulary would take five.
template <class P>
double kl_head(Context& ctx, MatrixView<const typename P::Operand> head,
               MatrixView<const typename P::Operand> teacher,
               MatrixView<const typename P::Operand> student, double unit,
               MatrixView<typename P::Scalar> dh);

inline constexpr std::int64_t kHeadTileElements = std::int64_t{1} << 24;

}  // namespace moesaic::converter
