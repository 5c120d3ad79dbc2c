#pragma once

#include <cstdint>
#include <span>

#include "converter/recovery/arithmetic.h"

namespace moesaic::converter {

/// A copy in the workspace, row t times √weight_t; with `intercept` a last column of √weight_t.
/// a [n, cols] raw bfloat16
MatrixView<const std::uint16_t> take_weighted(Context& ctx, MatrixView<const std::uint16_t> a,
                                              std::span<const float> weight, bool intercept);

}  // namespace moesaic::converter
