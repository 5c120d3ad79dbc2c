#include "kernels/top_k.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "kernels/base/error.h"
#include "tests/kernels/support.h"
#include "tests/reference/ops.h"

namespace moesaic {
namespace {

// The result of the kernel, with a canary behind each of its outputs.
std::vector<std::int32_t> select(const std::vector<float>& scores, std::size_t k) {
  constexpr std::size_t kGuard = 32;
  std::vector<std::int32_t> ids(k + kGuard, -7);
  std::vector<std::uint32_t> keys(scores.size() + kGuard, 7u);
  kernels::top_k(scores, std::span(ids).first(k), std::span(keys).first(scores.size()));
  EXPECT_TRUE(std::all_of(ids.begin() + static_cast<std::ptrdiff_t>(k), ids.end(),
                          [](std::int32_t id) { return id == -7; }));
  EXPECT_TRUE(std::all_of(keys.begin() + static_cast<std::ptrdiff_t>(scores.size()), keys.end(),
                          [](std::uint32_t key) { return key == 7u; }));
  ids.resize(k);
  return ids;
}

std::vector<std::int32_t> first(std::size_t k) {
  std::vector<std::int32_t> ids(k);
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

class TopK : public OnEachTarget {};

TEST_P(TopK, RandomScoresOfManySizes) {
  for (const std::size_t n : {1, 2, 3, 7, 15, 16, 17, 63, 64, 65, 100, 255, 1000, 1408, 5000}) {
    const auto scores = normal_values(n, static_cast<unsigned>(n));
    for (const std::size_t k : {std::size_t{1}, n / 4, n / 2, n - 1, n}) {
      EXPECT_EQ(select(scores, k), reference::top_k(scores, k)) << "n " << n << " k " << k;
    }
  }
}

TEST_P(TopK, EveryKOfOneVector) {
  const auto scores = normal_values(77, 3);
  for (std::size_t k = 0; k <= 77; ++k) EXPECT_EQ(select(scores, k), reference::top_k(scores, k));
}

TEST_P(TopK, FewDistinctScores) {
  auto scores = normal_values(1000, 4);
  for (float& s : scores) s = std::round(s);
  for (std::size_t k = 0; k <= 1000; k += 13) {
    EXPECT_EQ(select(scores, k), reference::top_k(scores, k));
  }
}

TEST_P(TopK, ScoresOfAllMagnitudes) {
  auto scores = normal_values(999, 5);
  for (std::size_t i = 0; i < scores.size(); ++i) {
    scores[i] = std::ldexp(scores[i], static_cast<int>(i % 250) - 125);
  }
  for (const std::size_t k : {1, 300, 500, 998}) {
    EXPECT_EQ(select(scores, k), reference::top_k(scores, k));
  }
}

TEST_P(TopK, NoScores) { EXPECT_TRUE(select({}, 0).empty()); }

TEST_P(TopK, KIsZero) { EXPECT_TRUE(select({3, 1, 2}, 0).empty()); }

TEST_P(TopK, KEqualsNExperts) {
  EXPECT_EQ(select(normal_values(130, 6), 130), first(130));
  EXPECT_EQ(select(std::vector<float>(130, kNan), 130), first(130));
}

TEST_P(TopK, TiesPickLowestId) {
  EXPECT_EQ(select({1, 2, 2, 2, 0}, 2), (std::vector<std::int32_t>{1, 2}));
  EXPECT_EQ(select(std::vector<float>(300, 0.25f), 100), first(100));
}

TEST_P(TopK, ZeroEqualsMinusZero) {
  std::vector<float> scores(40, -0.0f);
  for (std::size_t i = 1; i < scores.size(); i += 2) scores[i] = 0.0f;
  EXPECT_EQ(select(scores, 20), first(20));
}

TEST_P(TopK, NanCountsAsMinusInfinity) {
  EXPECT_EQ(select({kNan, -kInf, kNan, 1, kInf}, 2), (std::vector<std::int32_t>{3, 4}));
  EXPECT_EQ(select({kNan, -kInf, kNan, 1, kInf}, 3), (std::vector<std::int32_t>{0, 3, 4}));
  EXPECT_EQ(select({kNan, -std::numeric_limits<float>::max()}, 1), (std::vector<std::int32_t>{1}));
  EXPECT_EQ(select(std::vector<float>(50, -kNan), 9), first(9));
}

TEST_P(TopK, Infinities) {
  auto scores = normal_values(200, 7);
  for (std::size_t i = 0; i < 200; i += 3) scores[i] = i % 2 == 0 ? kInf : -kInf;
  for (const std::size_t k : {1, 30, 40, 150, 199}) {
    EXPECT_EQ(select(scores, k), reference::top_k(scores, k));
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, TopK, every_target(), target_name);

TEST(TopKErrors, NamesTheSizes) {
  std::vector<float> scores(3);
  std::vector<std::int32_t> ids(4);
  std::vector<std::uint32_t> keys(3);
  EXPECT_THROW(kernels::top_k(scores, ids, keys), ShapeError);
  EXPECT_THROW(kernels::top_k(scores, std::span(ids).first(2), std::span(keys).first(2)),
               ShapeError);
}

}  // namespace
}  // namespace moesaic
