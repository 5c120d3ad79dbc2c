#include "engine/logits.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace moesaic::engine {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kEps = 1.2e-7;  // of float32: the error of one exponential, and so of the mean

std::vector<float> waves(std::size_t n, float scale, float phase = 0) {
  std::vector<float> logits(n);
  for (std::size_t i = 0; i < n; ++i) {
    logits[i] = std::sin(static_cast<float>(i) * 1.7F + phase) * scale;
  }
  return logits;
}

double plain_log_sum_exp(const std::vector<float>& logits) {
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x));
  return std::log(sum);
}

TEST(Argmax, TiesAndNan) {
  EXPECT_EQ(argmax(std::vector<float>{kNan, 2.0F, 2.0F}), 1);
  EXPECT_EQ(argmax(std::vector<float>{kNan, -kInf, -kInf}), 1);
  EXPECT_EQ(argmax(std::vector<float>{-kInf, -1.0F, kNan}), 1);
  EXPECT_EQ(argmax(std::vector<float>{kNan, kNan}), 0);
}

TEST(Argmax, EveryLengthAndPlace) {
  for (std::size_t n = 1; n < 70; ++n) {
    for (std::size_t at = 0; at < n; ++at) {
      std::vector<float> logits(n, -3.0F);
      logits[at] = -1;
      logits[n - 1] = std::max(logits[n - 1], at % 2 == 0 ? -1.0F : -2.0F);  // sometimes a tie
      EXPECT_EQ(argmax(logits), static_cast<std::int32_t>(at));
      EXPECT_EQ(max_logit(logits), -1.0F);
    }
  }
  EXPECT_EQ(max_logit({}), -kInf);
}

TEST(LogSumExp, EqualsThePlainSum) {
  for (const std::size_t n : {1, 15, 16, 17, 1003, 50000}) {
    for (const float scale : {0.0F, 0.5F, 8.0F, 60.0F}) {
      const std::vector<float> logits = waves(n, scale);
      const double expected = plain_log_sum_exp(logits);
      // Each difference to the maximum is rounded once, each exponential to a few ulps.
      EXPECT_NEAR(log_sum_exp(logits), expected, 4 * kEps) << n << " " << scale;
    }
  }
}

TEST(LogSumExp, LargeAndSmallLogits) {
  EXPECT_NEAR(log_sum_exp(std::vector<float>{1000.0F, 1000.0F}), 1000 + std::log(2.0), 1e-9);
  EXPECT_NEAR(log_sum_exp(std::vector<float>{-1000.0F, -1000.0F, -kInf}), -1000 + std::log(2.0),
              1e-9);
  EXPECT_EQ(log_sum_exp(std::vector<float>{3.0F, -200.0F, -3e38F}), 3.0);
}

TEST(LogSumExp, InfinityAndNan) {
  EXPECT_EQ(log_sum_exp(std::vector<float>{-kInf, -kInf}), -kInf);
  EXPECT_EQ(log_sum_exp(std::vector<float>{0.0F, kInf}), kInf);
  EXPECT_TRUE(std::isnan(log_sum_exp(std::vector<float>{0.0F, kNan})));
  EXPECT_TRUE(std::isnan(log_sum_exp(std::vector<float>{kInf, kNan})));
  std::vector<float> many(40, 1.0F);
  many[3] = kNan;
  EXPECT_TRUE(std::isnan(log_sum_exp(many)));
}

TEST(KlDivergence, EqualsThePlainSum) {
  for (const std::size_t n : {1, 16, 37, 5000}) {
    const std::vector<float> p = waves(n, 6), q = waves(n, 6, 0.1F);
    const double lse_p = plain_log_sum_exp(p), lse_q = plain_log_sum_exp(q);
    double expected = 0, size = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const double term = std::exp(p[i] - lse_p) * ((p[i] - lse_p) - (q[i] - lse_q));
      expected += term;
      size += std::abs(term);
    }
    // Probabilities err by a few ulps and by the rounding of their logarithm, which is below 16.
    EXPECT_NEAR(kl_divergence(p, lse_p, q, lse_q), expected, 12 * kEps * size + 1e-15) << n;
  }
}

TEST(KlDivergence, OfEqualDistributionsIsZero) {
  const std::vector<float> p = waves(100, 9);
  const double lse = log_sum_exp(p);
  EXPECT_EQ(kl_divergence(p, lse, p, lse), 0);
}

TEST(KlDivergence, ImpossibleIdsDoNotCount) {
  const std::vector<float> p = {0.0F, -kInf}, q = {0.0F, 0.0F};
  EXPECT_NEAR(kl_divergence(p, 0, q, std::log(2.0)), std::log(2.0), 1e-12);
  EXPECT_EQ(kl_divergence(p, 0, p, 0), 0);
}

}  // namespace
}  // namespace moesaic::engine
