#include "converter/recovery/low_rank_update.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "kernels/base/error.h"

namespace moesaic::converter {
namespace {

// to += s from.
template <class T>
void add_scaled(Context& ctx, T s, MatrixView<const T> from, MatrixView<T> to) {
  for_each_row(ctx, to.rows, [&](std::int64_t r, int) {
    for (std::int64_t i = 0; i < to.cols; ++i) to.row(r)[i] += s * from.row(r)[i];
  });
}

}  // namespace

template <class P>
LowRankUpdate<P>::LowRankUpdate(MatrixView<const Scalar> w, std::int64_t rank, std::uint64_t seed)
    : rows_(w.rows), cols_(w.cols), rank_(rank) {
  require<ShapeError>(rank >= 1, "a low-rank update of rank {}, expected 1 or more", rank);
  const auto n_a = static_cast<std::size_t>(rank * cols_);
  const auto n_b = static_cast<std::size_t>(rows_ * rank);
  w_ = AlignedBuffer<Scalar>(static_cast<std::size_t>(rows_ * cols_));
  a_ = AlignedBuffer<Scalar>(n_a);
  b_ = AlignedBuffer<Scalar>(n_b);
  a_gradient_ = AlignedBuffer<Scalar>(n_a);
  b_gradient_ = AlignedBuffer<Scalar>(n_b);
  a_operand_ = AlignedBuffer<Operand>(n_a);
  b_operand_ = AlignedBuffer<Operand>(n_b);
  double square = 0;
  for (std::int64_t r = 0; r < rows_; ++r) {
    std::copy_n(w.row(r), cols_, w_.data() + r * cols_);
    for (std::int64_t i = 0; i < cols_; ++i) {
      square += static_cast<double>(w.row(r)[i]) * static_cast<double>(w.row(r)[i]);
    }
  }
  scale_ = static_cast<Scalar>(std::sqrt(square / static_cast<double>(rows_ * cols_)));
  std::mt19937_64 rng(seed);
  std::normal_distribution<double> normal(0, 1 / std::sqrt(static_cast<double>(rank)));
  for (Scalar& v : a_) v = static_cast<Scalar>(normal(rng));
}

template <class P>
void LowRankUpdate<P>::refresh(Context& ctx) {
  to_operand(ctx, matrix(std::as_const(a_), rank_, cols_), matrix(a_operand_, rank_, cols_));
  to_operand(ctx, matrix(std::as_const(b_), rows_, rank_), matrix(b_operand_, rows_, rank_));
}

template <class P>
MatrixView<typename P::Scalar> LowRankUpdate<P>::take_merged(Context& ctx) {
  const MatrixView<Scalar> merged = take_matrix<Scalar>(ctx, rows_, cols_);
  multiply(ctx, false, false, matrix(std::as_const(b_operand_), rows_, rank_),
           matrix(std::as_const(a_operand_), rank_, cols_), false, merged);
  for_each_row(ctx, rows_, [&](std::int64_t r, int) {
    const Scalar* w = w_.data() + r * cols_;
    for (std::int64_t i = 0; i < cols_; ++i) {
      merged.row(r)[i] = w[i] + scale_ * merged.row(r)[i];
    }
  });
  return merged;
}

template <class P>
void LowRankUpdate<P>::backward(Context& ctx, MatrixView<const Operand> x,
                                MatrixView<const Operand> dy) {
  const Workspace::Scope scope(ctx.workspace);
  const std::int64_t n = x.rows;
  const MatrixView<Scalar> inner = take_matrix<Scalar>(ctx, n, rank_);
  const MatrixView<Operand> operand = take_matrix<Operand>(ctx, n, rank_);
  // ∂L/∂B = s dyᵀ (x Aᵀ)
  multiply(ctx, false, true, x, matrix(std::as_const(a_operand_), rank_, cols_), false, inner);
  to_operand(ctx, constant(inner), operand);
  const MatrixView<Scalar> db = take_matrix<Scalar>(ctx, rows_, rank_);
  multiply(ctx, true, false, dy, constant(operand), false, db);
  add_scaled(ctx, scale_, constant(db), matrix(b_gradient_, rows_, rank_));
  // ∂L/∂A = s (dy B)ᵀ x
  multiply(ctx, false, false, dy, matrix(std::as_const(b_operand_), rows_, rank_), false, inner);
  to_operand(ctx, constant(inner), operand);
  const MatrixView<Scalar> da = take_matrix<Scalar>(ctx, rank_, cols_);
  multiply(ctx, true, false, constant(operand), x, false, da);
  add_scaled(ctx, scale_, constant(da), matrix(a_gradient_, rank_, cols_));
}

template class LowRankUpdate<Float64>;
template class LowRankUpdate<Float32>;
template class LowRankUpdate<Bfloat16>;

}  // namespace moesaic::converter
