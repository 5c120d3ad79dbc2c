#pragma once

#include <cstdint>
#include <span>

#include "converter/linalg.h"
#include "converter/recovery/arithmetic.h"

namespace moesaic::converter {

/// A copy in the workspace, row t times √weight_t; with `intercept` a last column of √weight_t.
/// a [n, cols] raw bfloat16
MatrixView<const std::uint16_t> take_weighted(Context& ctx, MatrixView<const std::uint16_t> a,
                                              std::span<const float> weight, bool intercept);

/// Lower Cholesky factor of second moments [n, n]; what was never seen (an expert that no token
/// selected) is held by a hundredth of the mean diagonal.
DMatrix moment_factor(const AlignedBuffer<float>& moments, std::int64_t n);

}  // namespace moesaic::converter
