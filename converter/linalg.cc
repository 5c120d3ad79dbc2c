#include "converter/linalg.h"

#include <cblas.h>
#include <lapacke.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "kernels/base/error.h"

namespace moesaic::converter {
namespace {

// BLAS keeps to the calling thread: its own workers would go on spinning between calls, beside our
// pool, and results would depend on their number. The systems here take well under a second.
void keep_blas_to_this_thread() {
  static const bool once = [] {
    openblas_set_num_threads(1);
    return true;
  }();
  (void)once;
}

}  // namespace

DMatrix DMatrix::block(std::int64_t r, std::int64_t c, std::int64_t n_r, std::int64_t n_c) const {
  DMatrix out(n_r, n_c);
  for (std::int64_t i = 0; i < n_r; ++i) {
    std::copy_n(&data[static_cast<std::size_t>((r + i) * cols + c)], n_c,
                out.data.begin() + i * n_c);
  }
  return out;
}

namespace {

// LAPACK is column-major: a row-major symmetric matrix is its own transpose, so "upper" there is
// our lower triangle, and a row-major [n, m] block of right-hand sides goes through LAPACKE's
// transposing interface.
std::optional<DMatrix> try_cholesky(DMatrix a, int* minor = nullptr) {
  keep_blas_to_this_thread();
  const auto n = static_cast<lapack_int>(a.rows);
  const lapack_int info = LAPACKE_dpotrf(LAPACK_COL_MAJOR, 'U', n, a.data.data(), n);
  if (minor != nullptr) *minor = static_cast<int>(info);
  if (info != 0) return std::nullopt;
  for (std::int64_t i = 0; i < a.rows; ++i) {
    for (std::int64_t j = i + 1; j < a.cols; ++j) a.at(i, j) = 0;
  }
  return a;
}

}  // namespace

DMatrix cholesky(DMatrix a) {
  const std::int64_t n = a.rows;
  int minor = 0;
  std::optional<DMatrix> l = try_cholesky(std::move(a), &minor);
  require<Error>(l.has_value(), "cholesky: matrix of order {} is not positive definite (minor {})",
                 n, minor);
  return *std::move(l);
}

void solve_triangular(const DMatrix& l, bool transposed, DMatrix& b) {
  const auto n = static_cast<lapack_int>(l.rows);
  const auto m = static_cast<lapack_int>(b.cols);
  if (n == 0 || m == 0) return;
  const lapack_int info = LAPACKE_dtrtrs(LAPACK_ROW_MAJOR, 'L', transposed ? 'T' : 'N', 'N', n, m,
                                         l.data.data(), n, b.data.data(), m);
  require<Error>(info == 0, "solve_triangular: singular at row {}", static_cast<int>(info));
}

void solve_cholesky(const DMatrix& l, DMatrix& b) {
  solve_triangular(l, false, b);
  solve_triangular(l, true, b);
}

DMatrix multiply(const DMatrix& a, bool trans_a, const DMatrix& b, bool trans_b) {
  keep_blas_to_this_thread();
  const std::int64_t m = trans_a ? a.cols : a.rows;
  const std::int64_t k = trans_a ? a.rows : a.cols;
  const std::int64_t n = trans_b ? b.rows : b.cols;
  require<ShapeError>(k == (trans_b ? b.cols : b.rows), "multiply: inner sizes {} and {}", k,
                      trans_b ? b.cols : b.rows);
  DMatrix c(m, n);
  if (m == 0 || n == 0 || k == 0) return c;
  cblas_dgemm(CblasRowMajor, trans_a ? CblasTrans : CblasNoTrans,
              trans_b ? CblasTrans : CblasNoTrans, static_cast<blasint>(m), static_cast<blasint>(n),
              static_cast<blasint>(k), 1.0, a.data.data(), static_cast<blasint>(a.cols),
              b.data.data(), static_cast<blasint>(b.cols), 0.0, c.data.data(),
              static_cast<blasint>(n));
  return c;
}

DMatrix top_eigenvectors(DMatrix a, std::int64_t n_top) {
  const auto n = static_cast<lapack_int>(a.rows);
  DMatrix out(n_top, a.rows);
  if (n_top == 0) return out;
  require<ShapeError>(n_top <= a.rows, "top_eigenvectors: {} of a matrix of order {}", n_top,
                      a.rows);
  std::vector<double> values(static_cast<std::size_t>(n));
  std::vector<lapack_int> support(static_cast<std::size_t>(2 * n));
  lapack_int found = 0;
  const lapack_int info = LAPACKE_dsyevr(LAPACK_COL_MAJOR, 'V', 'I', 'U', n, a.data.data(), n, 0, 0,
                                         n - static_cast<lapack_int>(n_top) + 1, n, 0, &found,
                                         values.data(), out.data.data(), n, support.data());
  require<Error>(info == 0 && found == n_top, "top_eigenvectors: LAPACK dsyevr failed ({})",
                 static_cast<int>(info));
  // Column-major [n, n_top] is row-major [n_top, n], smallest first: reverse, and fix the signs.
  for (std::int64_t i = 0; i < n_top / 2; ++i) {
    std::swap_ranges(&out.at(i, 0), &out.at(i, 0) + n, &out.at(n_top - 1 - i, 0));
  }
  for (std::int64_t i = 0; i < n_top; ++i) {
    double* row = &out.at(i, 0);
    const double* peak = std::max_element(
        row, row + n, [](double x, double y) { return std::abs(x) < std::abs(y); });
    if (*peak < 0) std::for_each(row, row + n, [](double& x) { x = -x; });
  }
  return out;
}

namespace {

// Cholesky factor of A + ridge · unit · I, the ridge raised tenfold as often as it takes: moments
// of few distinct inputs, summed in float32, may have eigenvalues a little below zero.
DMatrix cholesky_with_ridge(const DMatrix& a, double ridge, double unit) {
  for (;; ridge = std::max(1e-6, 10 * ridge)) {
    DMatrix sum = a;
    for (std::int64_t i = 0; i < a.rows; ++i) sum.at(i, i) += ridge * unit + 1e-30;
    if (ridge > 1e6) return cholesky(std::move(sum));  // throws: NaN, or no moments at all
    if (auto l = try_cholesky(std::move(sum))) return *std::move(l);
  }
}

}  // namespace

LowRank reduced_rank_regression(DMatrix xx, DMatrix xt, std::int64_t rank, double ridge) {
  const std::int64_t d = xx.rows;
  double trace = 0;
  for (std::int64_t i = 0; i < d; ++i) trace += std::abs(xx.at(i, i));
  const DMatrix l = cholesky_with_ridge(xx, ridge, trace / static_cast<double>(d));
  solve_triangular(l, false, xt);                                           // M = L⁻¹ xt
  const DMatrix e = top_eigenvectors(multiply(xt, false, xt, true), rank);  // [r, d]
  LowRank out;
  out.u = multiply(xt, true, e, true);  // Mᵀ Eᵀ
  DMatrix vt(d, rank);                  // V = E L⁻¹, so Vᵀ = L⁻ᵀ Eᵀ
  for (std::int64_t i = 0; i < rank; ++i) {
    for (std::int64_t j = 0; j < d; ++j) vt.at(j, i) = e.at(i, j);
  }
  solve_triangular(l, true, vt);
  out.v = DMatrix(rank, d);
  for (std::int64_t i = 0; i < rank; ++i) {
    for (std::int64_t j = 0; j < d; ++j) out.v.at(i, j) = vt.at(j, i);
  }
  return out;
}

}  // namespace moesaic::converter
