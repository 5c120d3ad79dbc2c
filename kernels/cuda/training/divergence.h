#pragma once

#include <cstdint>

#include "kernels/base/view.h"
#include "kernels/cuda/base/stream.h"

namespace moesaic::cuda {

/// KL(p_t ‖ q_t) in nats of the softmaxes of two rows of logits, one divergence a row, and its
/// gradient in q's logits times `unit`, unit · (q_t − p_t), as an operand of products, unless
/// gradient is null.   p, q [n, vocab_size] without gaps; divergence [n]; gradient
/// [n, vocab_size]. Throws ShapeError.
void kl_divergence(ConstMatrix p, ConstMatrix q, float unit, double* divergence,
                   std::uint16_t* gradient, StreamHandle stream);

/// *total += Σ values, always in one order.   values [n]
void add_up(const double* values, std::int64_t n, double* total, StreamHandle stream);

}  // namespace moesaic::cuda
