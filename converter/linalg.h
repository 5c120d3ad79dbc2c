#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/base/aligned_buffer.h"

namespace moesaic::converter {

/// Owned row-major double matrix for the small dense algebra of the fits (a few thousand rows at
/// most).
struct DMatrix {
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::vector<double> data;

  DMatrix() = default;
  DMatrix(std::int64_t r, std::int64_t c)
      : rows(r), cols(c), data(static_cast<std::size_t>(r * c)) {}
  double& at(std::int64_t r, std::int64_t c) {
    return data[static_cast<std::size_t>(r * cols + c)];
  }
  double at(std::int64_t r, std::int64_t c) const {
    return data[static_cast<std::size_t>(r * cols + c)];
  }
  /// Rows [r, r + n_r) × columns [c, c + n_c), copied.
  DMatrix block(std::int64_t r, std::int64_t c, std::int64_t n_r, std::int64_t n_c) const;
};

/// Lower Cholesky factor L of a symmetric positive definite A = L Lᵀ (LAPACK dpotrf); the upper
/// part of the result is zero. Throws Error if A is not positive definite or not finite, with the
/// order of the offending minor.
DMatrix cholesky(DMatrix a);

/// B ← L⁻¹ B, or L⁻ᵀ B if `transposed`.  L [n, n] lower triangular, B [n, m] (LAPACK dtrtrs).
void solve_triangular(const DMatrix& l, bool transposed, DMatrix& b);

/// X = A⁻¹ B through A's Cholesky factor L.
void solve_cholesky(const DMatrix& l, DMatrix& b);

/// C = op(A) op(B) (BLAS dgemm).
DMatrix multiply(const DMatrix& a, bool trans_a, const DMatrix& b, bool trans_b);

/// The n_top eigenvectors of symmetric A [n, n] with the largest eigenvalues, as rows [n_top, n],
/// largest first (LAPACK dsyevr). Each is signed so that its entry of largest magnitude is
/// positive: repeatable.
DMatrix top_eigenvectors(DMatrix a, std::int64_t n_top);

/// Weighted least squares of targets T on inputs X under a rank bound, from their moments about the
/// weighted mean:
///   min over rank-r B:  tr[(T − X B)ᵀ Ω (T − X B)] + ridge-scaled ‖B‖²
/// xx = XᵀΩX [d, d], xt = XᵀΩT [d, m]. Cholesky xx = L Lᵀ, M = L⁻¹ xt, E = top-r eigenvectors of M
/// Mᵀ: V = E L⁻¹ [r, d], U = Mᵀ Eᵀ [m, r], T ≈ X Vᵀ Uᵀ. The ridge adds `ridge` times the mean
/// diagonal to xx; it is raised where that leaves xx indefinite. Source: reduced-rank regression
/// (Izenman 1975).
struct LowRank {
  DMatrix v;  // [r, d]
  DMatrix u;  // [m, r]
};
LowRank reduced_rank_regression(DMatrix xx, DMatrix xt, std::int64_t rank, double ridge);

}  // namespace moesaic::converter
