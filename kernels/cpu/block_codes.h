#pragma once

#include <cstdint>

#include "kernels/base/dtype.h"

namespace moesaic::kernels {

/// Codes of columns [32 unit, 32 unit + 32) of a packed row, unsigned, the format's bias left in
/// (Q8_0: 128, Q6_K: 32, Q5_0: 16, Q4_0: 8). Nothing for formats without codes.
void unit_codes(DType dtype, const std::uint8_t* row, std::int64_t unit, std::uint8_t (&codes)[32]);

}  // namespace moesaic::kernels
