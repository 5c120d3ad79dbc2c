#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "kernels/base/aligned_buffer.h"
#include "kernels/base/context.h"
#include "kernels/base/dtype.h"
#include "kernels/base/view.h"

namespace moesaic::converter {

/// A matrix of a file whose codes stay and whose blocks' scales learn, so that what is learnt can
/// be written without rounding any weight:
///
///   w_i = s_b c_i + o_b,   b the block of 32 that i lies in,   ∂L/∂s_b = Σ_i c_i ∂L/∂w_i, ∂L/∂o_b
///   = Σ_i ∂L/∂w_i
///
/// with offsets o where the format has minima (Q4_1, Q5_1). Source: PEQA (arXiv 2305.14152).
class BlockScales {
 public:
  /// True for Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
  static bool can_tune(DType dtype);

  /// Takes codes, scales and offsets out of `w`, whose dtype can_tune().
  explicit BlockScales(const WeightView& w);

  std::span<const std::int8_t> codes() const { return code_; }  // [rows, cols]
  std::span<float> scale() { return scale_.span(); }            // [n_blocks], row by row
  std::span<float> offset() { return offset_.span(); }          // the same, or empty
  std::span<float> scale_gradient() { return scale_gradient_.span(); }
  std::span<float> offset_gradient() { return offset_gradient_.span(); }

  /// The blocks' gradients, overwritten, from the weights'.
  void gather(Context& ctx, ConstMatrix gradient);

  /// The weights as the scales now stand.
  void scatter(Context& ctx, Matrix value) const;

  /// The matrix in its format; scales and offsets are rounded to float16, nearest even.
  AlignedBuffer<std::byte> packed() const;

 private:
  DType dtype_;
  std::int64_t rows_, cols_;
  AlignedBuffer<std::byte> blocks_;  // as they came
  std::vector<std::int8_t> code_;    // [rows, cols]
  AlignedBuffer<float> scale_, offset_, scale_gradient_, offset_gradient_;
};

}  // namespace moesaic::converter
