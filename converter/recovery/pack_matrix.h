#pragma once

#include <cstddef>
#include <optional>
#include <span>

#include "converter/linalg.h"
#include "converter/recovery/arithmetic.h"
#include "kernels/base/dtype.h"

namespace moesaic::converter {

/// What to write rows of `cols` weights in that stand in a file as `own`: `wanted` if there is one,
/// own if it can be written, else Q8_0, else BF16. Throws InputError if `wanted` cannot hold them.
DType writable_type(DType own, std::optional<DType> wanted, std::int64_t cols);

/// Cholesky factor of Σ_t ω_t x_t x_tᵀ.   x [n, cols], ω [n]
DMatrix second_moments(Context& ctx, ConstMatrix x, std::span<const float> weight);

/// Rounds rows to a format in the moments of their inputs (round_inputs() in rounding.h) and gives
/// the bytes; w becomes what they hold.
AlignedBuffer<std::byte> round_and_pack(Context& ctx, Matrix w, const DMatrix& moments,
                                        DType dtype);

}  // namespace moesaic::converter
