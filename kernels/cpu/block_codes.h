#pragma once

#include <cstdint>

#include "kernels/base/dtype.h"

namespace moesaic::kernels {

/// Codes of columns [32 unit, 32 unit + 32) of a packed row, unsigned, the format's bias left in
/// (Q8_0: 128, Q6_K: 32, Q5_0: 16, Q4_0: 8). Nothing for formats without codes.
void unit_codes(DType dtype, const std::uint8_t* row, std::int64_t unit, std::uint8_t (&codes)[32]);

/// Puts codes [first, first + 32) of n, first a multiple of 32, n one of 64, in the order of down
/// rows (neurons.h) and of columns (columns.h), whose low nibbles come before the high ones of the
/// same bytes. Formats of 4 and 8 bits.
void crosswise_codes(DType dtype, const std::uint8_t (&codes)[32], std::int64_t first,
                     std::int64_t n, std::uint8_t* to);

}  // namespace moesaic::kernels
