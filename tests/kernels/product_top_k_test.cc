#include "kernels/product_top_k.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "kernels/base/error.h"
#include "tests/kernels/support.h"

namespace moesaic::kernels {
namespace {

// All n² sums, by a stable sort; values that are no numbers count as the least.
std::vector<std::int32_t> reference(const std::vector<float>& a, const std::vector<float>& b,
                                    std::size_t k) {
  const auto value = [](float v) {
    constexpr double kMost = std::numeric_limits<float>::max();
    return std::isnan(v) ? -kMost : std::clamp<double>(v, -kMost, kMost);
  };
  std::vector<double> sums;
  for (const float x : a) {
    for (const float y : b) sums.push_back(value(x) + value(y));
  }
  std::vector<std::int32_t> ids(sums.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(),
                   [&](std::int32_t x, std::int32_t y) { return sums[size(x)] > sums[size(y)]; });
  ids.resize(k);
  std::sort(ids.begin(), ids.end());
  return ids;
}

std::vector<std::int32_t> found(const std::vector<float>& a, const std::vector<float>& b,
                                std::size_t k) {
  const std::size_t n = a.size();
  std::vector<ProductCandidate> candidates(n_product_candidates(n, k));
  std::vector<float> values(2 * n);
  std::vector<std::uint32_t> keys(n);
  std::vector<std::int32_t> ranks(2 * std::min(n, k)), ids(k);
  top_k_product(a, b, ids, {candidates, values, keys, ranks});
  return ids;
}

TEST(TopKProduct, EqualsSortingAllPairs) {
  for (const std::size_t n : {1, 2, 3, 8, 17, 64}) {
    for (const std::size_t k : {std::size_t{0}, std::size_t{1}, n - 1, n, n + 1, 3 * n, n * n}) {
      if (k > n * n) continue;
      for (unsigned seed = 0; seed < 20; ++seed) {
        const std::vector<float> a = normal_values(n, 2 * seed), b = normal_values(n, 2 * seed + 1);
        EXPECT_EQ(found(a, b, k), reference(a, b, k)) << n << " keys, k " << k;
      }
    }
  }
}

TEST(TopKProduct, TiesPickLowestId) {
  EXPECT_EQ(found({1, 1, 1}, {2, 2, 2}, 4), (std::vector<std::int32_t>{0, 1, 2, 3}));
  // Few distinct values: most sums are ties, and many pairs of different halves give the same sum.
  std::mt19937 random(3);
  for (int round = 0; round < 200; ++round) {
    std::vector<float> a(9), b(9);
    for (float& v : a) v = static_cast<float>(random() % 4);
    for (float& v : b) v = static_cast<float>(random() % 4);
    for (const std::size_t k : {1, 5, 9, 20, 80}) {
      ASSERT_EQ(found(a, b, k), reference(a, b, k)) << "round " << round << ", k " << k;
    }
  }
}

TEST(TopKProduct, ValuesThatAreNoNumbers) {
  const std::vector<float> a = {kNan, 1, -kInf, kInf, 0}, b = {2, kNan, kInf, -kInf, -1};
  for (std::size_t k = 0; k <= 25; ++k) EXPECT_EQ(found(a, b, k), reference(a, b, k)) << k;
}

TEST(TopKProduct, LooksAtFewCandidates) {
  EXPECT_EQ(n_product_candidates(100, 0), 0U);
  EXPECT_EQ(n_product_candidates(100, 1), 1U);
  EXPECT_EQ(n_product_candidates(3, 9), 9U);
  EXPECT_EQ(n_product_candidates(2, 3), 3U);
  EXPECT_LT(n_product_candidates(100, 64), 64U * 6U);
}

TEST(TopKProduct, ShapesMustFit) {
  const std::vector<float> three(3), four(4);
  EXPECT_THROW(found(three, four, 2), ShapeError);
  EXPECT_THROW(found(three, three, 10), ShapeError);
  std::vector<std::int32_t> ids(2);
  EXPECT_THROW(top_k_product(three, three, ids, {}), ShapeError);
}

}  // namespace
}  // namespace moesaic::kernels
