#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/base/view.h"
#include "kernels/cuda/base/stream.h"
#include "kernels/draw.h"

namespace moesaic::cuda {

inline constexpr std::int64_t kMaxSampleVocab = 1 << 18;

/// Bytes that sample() needs as workspace for so many rows.
std::size_t sample_workspace(std::int64_t n_rows);

/// Draws a token from each row as kernels::Draw says; −1 where every logit is NaN.   logits [n,
/// vocab_size], vocab_size at most kMaxSampleVocab, draws and ids [n], all in device memory;
/// workspace sample_workspace(n) bytes or more at a multiple of 256, zeroed before its first use
/// and given to one stream at a time. One cooperative launch; blocks share a row as far as the
/// device holds them at once. No sort: what is kept and what is drawn are radix searches in sums of
/// likelihoods, which are integers (multiples of 2⁻⁴⁴ of the largest) and so the same in any order,
/// whatever the number of blocks. All blocks find the largest logit; then, behind a grid barrier,
/// sum likelihoods, or count them by steps of 1/8 of a logit where top_k or top_p cuts; then,
/// behind another, list what is at least in the step of that cut. The row's last block searches
/// that list, or the whole row if it is too long. Where all rows are greedy there is no barrier.
///
/// Equals engine::Sampler, which sums doubles, but where `random` or top_p falls within about 2⁻²⁶
/// of the border between two tokens, or a likelihood within a double's rounding of min_p; a token
/// less likely than 2⁻⁴⁵ of the largest is never drawn. Throws ShapeError.
void sample(ConstMatrix logits, const kernels::Draw* draws, std::int32_t* ids, std::byte* workspace,
            StreamHandle stream);

}  // namespace moesaic::cuda
