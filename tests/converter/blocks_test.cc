#include "converter/blocks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <set>

#include "kernels/base/aligned_buffer.h"
#include "kernels/base/error.h"

namespace moesaic::converter {
namespace {

struct Affinities {
  std::int64_t n;
  AlignedBuffer<float> values;

  explicit Affinities(std::int64_t size) : n(size), values(static_cast<std::size_t>(size * size)) {}
  Matrix matrix() { return {values.data(), n, n}; }
  void set(std::int64_t i, std::int64_t j, float v) {
    matrix().row(i)[j] = v;
    matrix().row(j)[i] = v;
  }
  double within(const std::vector<std::int32_t>& items, std::size_t size) {
    double sum = 0;
    for (std::size_t i = 0; i < items.size(); ++i) {
      for (std::size_t j = i + 1; j < items.size() && j / size == i / size; ++j) {
        sum += matrix().row(items[i])[items[j]];
      }
    }
    return sum;
  }
};

Affinities random_affinities(std::int64_t n, unsigned seed) {
  std::mt19937 rng(seed);
  std::uniform_real_distribution<float> uniform(-0.5F, 0.5F);
  Affinities a(n);
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = i; j < n; ++j) a.set(i, j, uniform(rng));
  }
  return a;
}

TEST(BalancedGroups, FindsPlantedOnes) {
  // Item i belongs to group i % 6; what binds a group outweighs all noise.
  Affinities a = random_affinities(48, 1);
  for (std::int64_t i = 0; i < 48; ++i) {
    for (std::int64_t j = i % 6; j < i; j += 6) a.set(i, j, a.matrix().row(i)[j] + 2);
  }
  const std::vector<std::int32_t> items = balanced_groups(a.matrix(), 8);
  ASSERT_EQ(items.size(), 48U);
  for (std::size_t i = 0; i < items.size(); ++i) EXPECT_EQ(items[i] % 6, items[i / 8 * 8] % 6);
}

TEST(BalancedGroups, APermutationThatNoExchangeImproves) {
  Affinities a = random_affinities(36, 2);
  for (const std::int64_t size : {2, 3, 6, 12}) {
    std::vector<std::int32_t> items = balanced_groups(a.matrix(), size);
    EXPECT_EQ(std::set(items.begin(), items.end()).size(), 36U);
    const auto u = static_cast<std::size_t>(size);
    const double reached = a.within(items, u);
    for (std::size_t i = 0; i < items.size(); ++i) {
      for (std::size_t j = (i / u + 1) * u; j < items.size(); ++j) {
        std::swap(items[i], items[j]);
        EXPECT_LE(a.within(items, u), reached + 1e-4) << size << ": " << i << ", " << j;
        std::swap(items[i], items[j]);
      }
    }
  }
}

TEST(BalancedGroups, OfOneOrAllKeepTheOrder) {
  Affinities a = random_affinities(10, 3);
  std::vector<std::int32_t> order(10);
  std::iota(order.begin(), order.end(), 0);
  EXPECT_EQ(balanced_groups(a.matrix(), 1), order);
  EXPECT_EQ(balanced_groups(a.matrix(), 10), order);
  EXPECT_TRUE(balanced_groups({}, 4).empty());
}

TEST(BalancedGroups, SizeMustDivide) {
  Affinities a = random_affinities(10, 4);
  EXPECT_THROW(balanced_groups(a.matrix(), 3), ShapeError);
  EXPECT_THROW(balanced_groups(a.matrix(), 0), ShapeError);
  EXPECT_THROW(balanced_groups(ConstMatrix(a.values.data(), 5, 10), 5), ShapeError);
}

}  // namespace
}  // namespace moesaic::converter
