#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/base/view.h"
#include "kernels/cuda/base/stream.h"
#include "kernels/mixture.h"

namespace moesaic::cuda {

/// Bytes that mixture() needs as workspace, whatever the number of tokens.
std::size_t mixture_workspace(const kernels::MixtureView& layer);

/// kernels::mixture, 8 tokens at a time: router and bypass by linear(), top-k, gates, a warp per
/// neuron, then a block per 256 columns of a token. Product keys are expanded to all sums of two:
/// n_experts floats a token. Of the experts only the selected ones are read, for each token again.
///
///   x, y      [n_tokens, d_model], distinct memory; rows at multiples of 16 bytes
///   selected  [n_tokens, n_active], receives the chosen ids, ascending per token; may be null
///   gates     likewise, what they were multiplied by; not written by layers without gates
///   workspace mixture_workspace() bytes at a multiple of 256, given to one stream at a time
///
/// float32 throughout; deterministic. Throws ShapeError, also for product keys of a rank that is no
/// multiple of 4.
void mixture(const kernels::MixtureView& layer, ConstMatrix x, Matrix y, std::int32_t* selected,
             float* gates, std::byte* workspace, StreamHandle stream);

}  // namespace moesaic::cuda
