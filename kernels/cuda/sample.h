#pragma once

#include <cstdint>

#include "kernels/base/view.h"
#include "kernels/cuda/base/stream.h"
#include "kernels/draw.h"

namespace moesaic::cuda {

inline constexpr std::int64_t kMaxSampleVocab = 1 << 18;

/// Draws a token from each row as kernels::Draw says; −1 where every logit is NaN.   logits [n,
/// vocab_size], vocab_size at most kMaxSampleVocab, draws and ids [n], all in device memory. One
/// launch, a block a row; no sort: what is kept and what is drawn are radix searches in sums of
/// likelihoods, which are integers (multiples of 2⁻⁴⁴ of the largest) and so the same in any order.
/// Equals engine::Sampler, which sums doubles, but where `random` or top_p falls within about 2⁻²⁶
/// of the border between two tokens, or a likelihood within a double's rounding of min_p; a token
/// less likely than 2⁻⁴⁵ of the largest is never drawn. Throws ShapeError.
void sample(ConstMatrix logits, const kernels::Draw* draws, std::int32_t* ids, StreamHandle stream);

}  // namespace moesaic::cuda
