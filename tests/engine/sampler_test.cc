#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <string>

#include "kernels/base/error.h"
#include "tests/engine/fake_decoder.h"

namespace moesaic::engine {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

SamplingOptions plain() {
  SamplingOptions options;
  options.temperature = 1;
  options.top_k = 0;
  options.top_p = 1;
  options.min_p = 0;
  return options;
}

// The distribution that the options define, by whole sorts and plain sums.
std::map<std::int32_t, double> oracle(const std::vector<float>& logits, const SamplingOptions& o) {
  std::vector<std::int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](std::int32_t a, std::int32_t b) {
    return logits[static_cast<std::size_t>(a)] > logits[static_cast<std::size_t>(b)];
  });
  const auto probabilities = [&](double temperature) {
    std::vector<double> p;
    double sum = 0;
    for (const std::int32_t id : ids) {
      p.push_back(std::exp((logits[static_cast<std::size_t>(id)] -
                            static_cast<double>(logits[static_cast<std::size_t>(ids[0])])) /
                           temperature));
      sum += p.back();
    }
    for (double& x : p) x /= sum;
    return p;
  };
  if (o.top_k > 0) {
    ids.resize(std::min(ids.size(), static_cast<std::size_t>(o.top_k)));
  }
  if (o.top_p < 1) {
    const std::vector<double> p = probabilities(1);
    double sum = 0;
    std::size_t n = 0;
    while (n < p.size() && (n == 0 || sum < o.top_p)) sum += p[n++];
    ids.resize(n);
  }
  const std::vector<double> p = probabilities(1);
  std::size_t n = 0;
  while (n < p.size() && p[n] >= o.min_p * p[0]) ++n;
  ids.resize(n);
  std::map<std::int32_t, double> result;
  const std::vector<double> tempered = probabilities(o.temperature);
  for (std::size_t i = 0; i < ids.size(); ++i) result[ids[i]] = tempered[i];
  return result;
}

// Draws often and compares frequencies; five standard deviations, so that a right sampler fails
// once in a million.
void expect_distribution(const std::vector<float>& logits, const SamplingOptions& options) {
  constexpr int kDraws = 20000;
  const std::map<std::int32_t, double> expected = oracle(logits, options);
  std::map<std::int32_t, int> counts;
  Sampler sampler(options);
  for (int i = 0; i < kDraws; ++i) ++counts[sampler.sample(logits, {})];
  for (const auto& [id, n] : counts) EXPECT_TRUE(expected.contains(id)) << id << " drawn";
  for (const auto& [id, p] : expected) {
    EXPECT_NEAR(counts[id], p * kDraws, 5 * std::sqrt(p * (1 - p) * kDraws) + 1) << id;
  }
}

TEST(Sampler, FollowsTheDistribution) {
  expect_distribution({0.0F, 1.0F, -1.0F, 2.0F, 0.5F}, plain());
}

TEST(Sampler, TemperatureSharpensAfterTheCuts) {
  SamplingOptions options = plain();
  options.temperature = 0.5F;
  options.top_p = 0.8F;
  expect_distribution({0.0F, 1.0F, -1.0F, 2.0F, 0.5F}, options);
}

TEST(Sampler, TopKKeepsTheLargestTiesByLowestId) {
  SamplingOptions options = plain();
  options.top_k = 2;
  expect_distribution({1.0F, 3.0F, 1.0F, 1.0F}, options);
}

TEST(Sampler, MinPCutsRelativeToTheLargest) {
  SamplingOptions options = plain();
  options.min_p = 0.2F;
  expect_distribution({0.0F, 1.0F, -1.0F, 2.0F, 0.5F}, options);
}

TEST(Sampler, AllCutsTogether) {
  SamplingOptions options = plain();
  options.temperature = 1.5F;
  options.top_k = 6;
  options.top_p = 0.9F;
  options.min_p = 0.1F;
  expect_distribution({0.1F, 1.2F, -1.0F, 2.0F, 0.5F, 1.9F, -3.0F, 0.3F}, options);
}

TEST(Sampler, TopPOfALargeFlatVocabularyIsSortedInPieces) {
  // Half of a nearly flat distribution: far more than the first sorted piece.
  std::vector<float> logits(5000);
  for (std::size_t i = 0; i < logits.size(); ++i) {
    logits[i] = 1e-4F * static_cast<float>((i * 7919) % 5000);
  }
  SamplingOptions options = plain();
  options.top_p = 0.5F;
  const std::map<std::int32_t, double> expected = oracle(logits, options);
  EXPECT_GT(expected.size(), 2000U);
  EXPECT_LT(expected.size(), 2500U);
  Sampler sampler(options);
  std::map<std::int32_t, int> counts;
  for (int i = 0; i < 300; ++i) ++counts[sampler.sample(logits, {})];
  for (const auto& [id, n] : counts) EXPECT_TRUE(expected.contains(id)) << id;
}

// The order in which likelihoods are summed decides which token a random number stands for.
TEST(Sampler, DrawsInTheOrderOfDraw) {
  std::vector<float> logits(300);
  for (std::size_t i = 0; i < logits.size(); ++i) {
    logits[i] = 0.01F * static_cast<float>((i * 7919) % 300 / 2);  // in pairs of equals
  }
  for (const int k : {0, 1, 40, 299, 300}) {
    for (const float p : {1.0F, 0.7F}) {
      SamplingOptions options = plain();
      options.top_k = k;
      options.top_p = p;
      Sampler sampler(options), drawing(options);
      for (int i = 0; i < 50; ++i) {
        EXPECT_EQ(sampler.sample(logits, {}), Drawing<FakeDecoder>::draw(logits, drawing.draw()));
      }
    }
  }
}

TEST(Sampler, TopPZeroKeepsTheLargest) {
  SamplingOptions options = plain();
  options.top_p = 0;
  Sampler sampler(options);
  for (int i = 0; i < 50; ++i) {
    EXPECT_EQ(sampler.sample(std::vector<float>{1.0F, 2.0F, 1.9F}, {}), 1);
  }
}

TEST(Sampler, ZeroTemperatureIsGreedyTiesByLowestId) {
  SamplingOptions options;
  options.temperature = 0;
  Sampler sampler(options);
  EXPECT_EQ(sampler.sample(std::vector<float>{1.0F, 3.0F, 3.0F}, {}), 1);
  options.repeat_penalty = 1.5F;
  Sampler penalised(options);
  EXPECT_EQ(penalised.sample(std::vector<float>{1.0F, 3.0F, 3.0F}, {}), 1);
  const std::vector<std::int32_t> history = {1};
  EXPECT_EQ(penalised.sample(std::vector<float>{1.0F, 3.0F, 3.0F}, history), 2);
}

TEST(Sampler, PenaltyLowersPositiveAndNegativeLogitsOnce) {
  SamplingOptions options;
  options.temperature = 0;
  options.repeat_penalty = 2;
  Sampler sampler(options);
  // 3/2 = 1.5 > 1.4, although 3/2/2 would not be: 0 stands in the history twice.
  EXPECT_EQ(sampler.sample(std::vector<float>{3.0F, 1.4F}, std::vector<std::int32_t>{0, 0}), 0);
  EXPECT_EQ(sampler.sample(std::vector<float>{3.0F, 1.6F}, std::vector<std::int32_t>{0, 0}), 1);
  EXPECT_EQ(sampler.sample(std::vector<float>{-1.0F, -1.9F}, std::vector<std::int32_t>{0}), 1);
  EXPECT_EQ(sampler.sample(std::vector<float>{-1.0F, -2.1F}, std::vector<std::int32_t>{0}), 0);
}

TEST(Sampler, PenaltyLooksBackTheGivenNumberOfTokens) {
  SamplingOptions options;
  options.temperature = 0;
  options.repeat_penalty = 10;
  const std::vector<float> logits = {3.0F, 2.0F, 1.0F};
  const std::vector<std::int32_t> history = {0, 1, 99, -5};  // ids outside are left alone
  options.repeat_last_n = -1;
  EXPECT_EQ(Sampler(options).sample(logits, history), 2);
  options.repeat_last_n = 3;
  EXPECT_EQ(Sampler(options).sample(logits, history), 0);
  options.repeat_last_n = 2;
  EXPECT_EQ(Sampler(options).sample(logits, history), 0);
  options.repeat_last_n = 0;
  EXPECT_EQ(Sampler(options).sample(logits, history), 0);
  options.repeat_last_n = 100;
  EXPECT_EQ(Sampler(options).sample(logits, history), 2);
}

TEST(Sampler, SeedDecides) {
  SamplingOptions options = plain();
  const std::vector<float> logits(1000, 0.0F);
  const auto draw = [&](std::uint64_t seed) {
    options.seed = seed;
    Sampler sampler(options);
    std::vector<std::int32_t> ids;
    for (int i = 0; i < 20; ++i) ids.push_back(sampler.sample(logits, {}));
    return ids;
  };
  EXPECT_EQ(draw(7), draw(7));
  EXPECT_NE(draw(7), draw(8));
}

TEST(Sampler, NanIsNeverDrawn) {
  Sampler sampler(plain());
  for (int i = 0; i < 100; ++i) {
    EXPECT_EQ(sampler.sample(std::vector<float>{kNan, -5.0F, kNan}, {}), 1);
  }
  SamplingOptions greedy;
  greedy.temperature = 0;
  EXPECT_EQ(Sampler(greedy).sample(std::vector<float>{kNan, -kInf, kNan}, {}), 1);
}

TEST(Sampler, OnlyNanIsAnError) {
  SamplingOptions greedy;
  greedy.temperature = 0;
  EXPECT_THROW(Sampler(greedy).sample(std::vector<float>{kNan, kNan}, {}), Error);
  EXPECT_THROW(Sampler(plain()).sample(std::vector<float>{kNan, kNan}, {}), Error);
  EXPECT_THROW(Sampler(plain()).sample({}, {}), Error);
}

TEST(Sampler, InfiniteLogits) {
  Sampler sampler(SamplingOptions{});
  for (int i = 0; i < 50; ++i) {
    EXPECT_EQ(sampler.sample(std::vector<float>{0.0F, kInf, -kInf}, {}), 1);
    EXPECT_EQ(sampler.sample(std::vector<float>{-kInf, 0.0F, -kInf}, {}), 1);
    EXPECT_LT(sampler.sample(std::vector<float>{-kInf, -kInf}, {}), 2);
  }
}

TEST(Sampler, TinyTemperatureIsGreedy) {
  SamplingOptions options = plain();
  options.temperature = 1e-38F;
  Sampler sampler(options);
  for (int i = 0; i < 50; ++i) {
    EXPECT_EQ(sampler.sample(std::vector<float>{1.0F, 1.0001F, 0.9999F}, {}), 1);
  }
}

TEST(SamplingOptions, OutOfRangeNamesTheOption) {
  const auto expect_refused = [](const std::function<void(SamplingOptions&)>& change,
                                 const std::string& name) {
    SamplingOptions options;
    change(options);
    try {
      validate(options);
      FAIL() << name << " was accepted";
    } catch (const InputError& e) {
      EXPECT_NE(std::string(e.what()).find(name), std::string::npos) << e.what();
    }
  };
  expect_refused([](auto& o) { o.temperature = -0.1F; }, "temperature");
  expect_refused([](auto& o) { o.temperature = kNan; }, "temperature");
  expect_refused([](auto& o) { o.temperature = kInf; }, "temperature");
  expect_refused([](auto& o) { o.top_k = -1; }, "top_k");
  expect_refused([](auto& o) { o.top_p = 1.1F; }, "top_p");
  expect_refused([](auto& o) { o.top_p = kNan; }, "top_p");
  expect_refused([](auto& o) { o.min_p = -0.1F; }, "min_p");
  expect_refused([](auto& o) { o.min_p = kNan; }, "min_p");
  expect_refused([](auto& o) { o.repeat_penalty = 0; }, "repeat_penalty");
  expect_refused([](auto& o) { o.repeat_penalty = kNan; }, "repeat_penalty");
  expect_refused([](auto& o) { o.repeat_last_n = -2; }, "repeat_last_n");
  EXPECT_NO_THROW(validate(SamplingOptions{}));
}

}  // namespace
}  // namespace moesaic::engine
