#pragma once

#include <cstdint>
#include <span>

#include "kernels/base/context.h"

namespace moesaic::converter {

/// The k-th largest of the values, counted with ties: what stands at k − 1 in falling order. All
/// threads count, nothing is sorted or copied. Values >= 0, +∞ included, NaN not; k in [1,
/// values.size()], which is below 2^32. Throws InputError for another k.
float kth_largest(Context& ctx, std::span<const float> values, std::int64_t k);

}  // namespace moesaic::converter
