#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/base/thread_pool.h"
#include "kernels/base/view.h"

namespace moesaic::kernels {

/// The order in which the fast path reads single neurons (w_gate, w_up, w_down), one contiguous run
/// of bytes each, a multiple of 64. Made at load time; every code and every scale is the file's
/// own, only moved. BF16 rows stay as they are. The others begin with their scales, d (and m) in
/// float16, one per unit of 32 columns. Then the codes, Q8_0's as code + 128:
///
/// - gate and up, per 512 columns (16 units): 4 groups of [16 units][4] bytes, column c of a unit
/// in
///   a low nibble and 16 + c in the high one; Q8_0: 8 groups.
/// - gate and up, what remains, per 128 columns: 64 bytes, column c in a low nibble and 64 + c in
///   the high one; 32 bytes for a last 64 columns. Q8_0: in order.
/// - down, per 128 columns: 64 bytes, byte 16 l + 4 i + e is column 16 i + 4 l + e in its low
/// nibble
///   and 64 more in the high one; for a last 64 columns 32 bytes, 8 i + 4 l + e and 32 more. Q8_0:
///   per 64 columns as the low nibbles.
struct NeuronLayout {
  std::int64_t scale_bytes = 0;  // of one row
  std::int64_t code_bytes = 0;   // of one row
  std::int64_t row_bytes() const { return scale_bytes + code_bytes; }
  std::int64_t neuron_bytes() const { return (3 * row_bytes() + 63) / 64 * 64; }
  /// From one row to the next where rows stand alone (pack_in_rows()).
  std::int64_t single_row_bytes() const { return (row_bytes() + 63) / 64 * 64; }
};

/// True if rows of this format and length can be laid out like this and this machine has a fast
/// path for them: Q4_0, Q4_1, Q8_0 and BF16, a multiple of 64 columns, AVX-512 with VNNI and
/// bfloat16.
bool has_neurons(DType dtype, std::int64_t cols);

/// has_neurons(dtype, cols).
NeuronLayout neuron_layout(DType dtype, std::int64_t cols);

/// Writes neurons `range` to their place in `neurons`. Rows 3i, 3i + 1, 3i + 2 of `rows` are
/// neuron i.
void pack_neurons(const WeightView& rows, Range range, std::byte* neurons);

/// Writes rows `range` of w, each for itself and in the order of gate and up rows, to their place
/// in `to`: single_row_bytes() apart.
void pack_in_rows(const WeightView& w, Range range, std::byte* to);

}  // namespace moesaic::kernels
