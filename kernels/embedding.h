#pragma once

#include <cstdint>
#include <span>

#include "kernels/base/context.h"
#include "kernels/base/view.h"

namespace moesaic::kernels {

/// x_t = scale · table[ids_t].   table [vocab_size, d_model] any DType, x [n_tokens, d_model].
/// Throws InputError for an id outside the table, ShapeError for sizes.
void embed(Context& ctx, const WeightView& table, std::span<const std::int32_t> ids, float scale,
           Matrix x);

}  // namespace moesaic::kernels
