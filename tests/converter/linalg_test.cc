#include "converter/linalg.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "kernels/base/error.h"

namespace moesaic::converter {
namespace {

DMatrix random_matrix(std::int64_t rows, std::int64_t cols, std::uint64_t seed) {
  std::mt19937_64 rng(seed);
  std::normal_distribution<double> normal;
  DMatrix m(rows, cols);
  for (double& v : m.data) v = normal(rng);
  return m;
}

DMatrix positive_definite(std::int64_t n, std::uint64_t seed) {
  const DMatrix a = random_matrix(2 * n, n, seed);
  return multiply(a, true, a, false);
}

double distance(const DMatrix& a, const DMatrix& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.data.size(); ++i) sum += std::pow(a.data[i] - b.data[i], 2);
  return std::sqrt(sum);
}

TEST(Multiply, EqualsLoopsForEveryTransposition) {
  for (const bool ta : {false, true}) {
    for (const bool tb : {false, true}) {
      const DMatrix a = ta ? random_matrix(5, 3, 1) : random_matrix(3, 5, 1);
      const DMatrix b = tb ? random_matrix(4, 5, 2) : random_matrix(5, 4, 2);
      const DMatrix c = multiply(a, ta, b, tb);
      for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 4; ++j) {
          double want = 0;
          for (int p = 0; p < 5; ++p)
            want += (ta ? a.at(p, i) : a.at(i, p)) * (tb ? b.at(j, p) : b.at(p, j));
          EXPECT_NEAR(c.at(i, j), want, 1e-14);
        }
      }
    }
  }
}

TEST(Multiply, EmptyInnerSizeGivesZero) {
  const DMatrix c = multiply(DMatrix(2, 0), false, DMatrix(0, 3), false);
  EXPECT_EQ(c.data, std::vector<double>(6));
}

TEST(Cholesky, FactorTimesTransposeIsTheMatrix) {
  const DMatrix a = positive_definite(7, 3);
  const DMatrix l = cholesky(a);
  EXPECT_EQ(l.at(0, 6), 0);
  EXPECT_LT(distance(multiply(l, false, l, true), a), 1e-12 * 7 * 7 * 14);
}

TEST(Cholesky, IndefiniteMatrixThrows) {
  DMatrix a(2, 2);
  a.at(0, 0) = 1;
  a.at(1, 1) = -1;
  EXPECT_THROW(cholesky(a), Error);
}

TEST(SolveCholesky, SolvesSeveralRightHandSides) {
  const DMatrix a = positive_definite(6, 4);
  const DMatrix x = random_matrix(6, 3, 5);
  DMatrix b = multiply(a, false, x, false);
  solve_cholesky(cholesky(a), b);
  EXPECT_LT(distance(b, x), 1e-9);
}

TEST(TopEigenvectors, AreOrthonormalLargestFirst) {
  const DMatrix a = positive_definite(8, 6);
  const DMatrix e = top_eigenvectors(a, 3);
  const DMatrix gram = multiply(e, false, e, true);
  const DMatrix rayleigh = multiply(multiply(e, false, a, false), false, e, true);
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) {
      EXPECT_NEAR(gram.at(i, j), i == j, 1e-12);
      if (i != j) {
        EXPECT_NEAR(rayleigh.at(i, j), 0, 1e-10);
      }
    }
  }
  EXPECT_GE(rayleigh.at(0, 0), rayleigh.at(1, 1));
  EXPECT_GE(rayleigh.at(1, 1), rayleigh.at(2, 2));
}

// At full rank the regression is ordinary least squares; at the data's own rank it is exact.
TEST(ReducedRankRegression, FullRankIsLeastSquaresAndTrueRankIsExact) {
  const DMatrix x = random_matrix(200, 6, 7);
  const DMatrix b =
      multiply(random_matrix(6, 2, 8), false, random_matrix(2, 5, 9), false);  // rank 2
  const DMatrix t = multiply(x, false, b, false);
  const DMatrix xx = multiply(x, true, x, false);
  const DMatrix xt = multiply(x, true, t, false);
  for (const std::int64_t rank : {2, 6 - 1}) {
    const LowRank fit = reduced_rank_regression(xx, xt, std::min<std::int64_t>(rank, 5), 0);
    EXPECT_LT(distance(multiply(fit.v, true, fit.u, true), b), 1e-8) << "rank " << rank;
  }
}

// Below the data's rank no other rank-1 map that we try does better.
TEST(ReducedRankRegression, RankOneBeatsPerturbations) {
  const DMatrix x = random_matrix(300, 4, 10);
  const DMatrix t = multiply(x, false, random_matrix(4, 3, 11), false);
  const LowRank fit =
      reduced_rank_regression(multiply(x, true, x, false), multiply(x, true, t, false), 1, 0);
  const auto error = [&](const LowRank& f) {
    return distance(multiply(multiply(x, false, f.v, true), false, f.u, true), t);
  };
  const double best = error(fit);
  std::mt19937_64 rng(12);
  std::normal_distribution<double> normal(0, 0.05);
  for (int trial = 0; trial < 50; ++trial) {
    LowRank other = fit;
    for (double& v : other.v.data) v += normal(rng);
    for (double& v : other.u.data) v += normal(rng);
    EXPECT_GE(error(other), best * (1 - 1e-12));
  }
}

}  // namespace
}  // namespace moesaic::converter
