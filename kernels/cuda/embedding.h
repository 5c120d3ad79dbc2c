#pragma once

#include <cstdint>

#include "kernels/base/view.h"
#include "kernels/cuda/base/stream.h"

namespace moesaic::cuda {

/// x_t = scale · table[ids_t], bit for bit kernels::embed.   table [vocab_size, d_model] any DType,
/// ids [x.rows], x [n_tokens, d_model], all in device memory. An id outside the table makes its row
/// NaN: nobody on the host has seen a token that the device has sampled. Throws ShapeError.
void embed(const WeightView& table, const std::int32_t* ids, float scale, Matrix x,
           StreamHandle stream);

}  // namespace moesaic::cuda
