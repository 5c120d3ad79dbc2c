#pragma once

#include <cstdint>
#include <span>

#include "converter/recovery/arithmetic.h"

namespace moesaic::converter {

/// A matrix that stays, W [n, m], and an update of low rank that learns:
///
///   W' = W + s B A,   B [n, r] zero at the start, A [r, m] random of variance 1/r, s the root mean
///   square of W
///
/// so that a change of B by ε changes W' by about ε of its size. Source: LoRA (arXiv 2106.09685).
template <class P>
class LowRankUpdate {
 public:
  using Scalar = typename P::Scalar;
  using Operand = typename P::Operand;

  /// Takes a copy of W. Throws ShapeError for a rank below 1.
  LowRankUpdate(MatrixView<const Scalar> w, std::int64_t rank, std::uint64_t seed);

  std::span<Scalar> a() { return a_.span(); }
  std::span<Scalar> b() { return b_.span(); }
  std::span<Scalar> a_gradient() { return a_gradient_.span(); }
  std::span<Scalar> b_gradient() { return b_gradient_.span(); }

  /// Takes A and B over after they changed.
  void refresh(Context& ctx);

  /// W'.   [n, m], in workspace memory of the caller's scope
  MatrixView<Scalar> take_merged(Context& ctx);

  /// Adds ∂L/∂A and ∂L/∂B where y = x W'ᵀ.   x [tokens, m], dy = ∂L/∂y [tokens, n]
  void backward(Context& ctx, MatrixView<const Operand> x, MatrixView<const Operand> dy);

  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }

 private:
  std::int64_t rows_, cols_, rank_;
  Scalar scale_ = 0;
  AlignedBuffer<Scalar> w_, a_, b_, a_gradient_, b_gradient_;
  AlignedBuffer<Operand> a_operand_, b_operand_;
};

}  // namespace moesaic::converter
