#include "models/divergence_statistics.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/base/error.h"

namespace moesaic::models {
namespace {

// Tokens of two models of which the second follows the first.
std::vector<TokenDivergence> some_tokens(std::size_t n, std::uint64_t seed = 1) {
  std::mt19937_64 rng(seed);
  std::exponential_distribution<float> loss(0.3F), kl(2.0F);
  std::normal_distribution<float> noise(0.2F, 0.5F);
  std::vector<TokenDivergence> tokens;
  for (std::size_t i = 0; i < n; ++i) {
    const float base = loss(rng);
    tokens.push_back({base, std::max(0.0F, base + noise(rng)), kl(rng), rng() % 4 != 0});
  }
  return tokens;
}

// The definitions, with E[x²] − E[x]² as they are written.
struct Loops {
  explicit Loops(std::size_t n_tokens) : n(static_cast<double>(n_tokens)) {}
  double n;

  double mean(const std::vector<double>& x) const {
    double sum = 0;
    for (const double v : x) sum += v;
    return sum / n;
  }
  double covariance(const std::vector<double>& x, const std::vector<double>& y) const {
    double sum = 0;
    for (std::size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
    return (sum / n - mean(x) * mean(y)) / (n - 1);
  }
  double error(const std::vector<double>& x) const { return std::sqrt(covariance(x, x)); }
};

void expect_estimate(const Estimate& found, double value, double stderror, const char* what) {
  EXPECT_NEAR(found.value, value, 1e-9 * std::max(1.0, std::abs(value))) << what;
  EXPECT_NEAR(found.stderror, stderror, 1e-9 * std::max(1.0, stderror)) << what;
}

TEST(DivergenceStatistics, EqualsTheLoops) {
  const auto tokens = some_tokens(1001);
  const Loops loops(tokens.size());
  std::vector<double> base, q, difference, kl, delta, squares, same;
  for (const TokenDivergence& t : tokens) {
    base.push_back(t.nll_base);
    q.push_back(t.nll_q);
    difference.push_back(q.back() - base.back());
    kl.push_back(t.kl);
    delta.push_back(std::exp(-q.back()) - std::exp(-base.back()));
    squares.push_back(delta.back() * delta.back());
    same.push_back(t.same_top ? 1 : 0);
  }
  const DivergenceStatistics s = divergence_statistics(tokens);
  EXPECT_EQ(s.n_tokens, 1001);
  const double ppl_base = std::exp(loops.mean(base));
  const double ppl_q = std::exp(loops.mean(q));
  expect_estimate(s.perplexity_base, ppl_base, ppl_base * loops.error(base), "base");
  expect_estimate(s.perplexity_q, ppl_q, ppl_q * loops.error(q), "q");
  EXPECT_NEAR(s.ln_perplexity_correlation,
              loops.covariance(base, q) / loops.error(base) / loops.error(q), 1e-9);
  expect_estimate(s.ln_perplexity_ratio, std::log(ppl_q / ppl_base), loops.error(difference), "ln");
  expect_estimate(s.perplexity_ratio, ppl_q / ppl_base, ppl_q / ppl_base * loops.error(difference),
                  "ratio");
  // Propagated: the error of ppl_q · (nll_q's mean) − ppl_base · (nll_base's mean).
  std::vector<double> linear;
  for (std::size_t i = 0; i < q.size(); ++i) linear.push_back(ppl_q * q[i] - ppl_base * base[i]);
  expect_estimate(s.perplexity_difference, ppl_q - ppl_base, loops.error(linear), "difference");
  expect_estimate(s.kl, loops.mean(kl), loops.error(kl), "kl");
  expect_estimate(s.delta_p, loops.mean(delta), loops.error(delta), "delta p");
  const double rms = std::sqrt(loops.mean(squares));
  expect_estimate(s.rms_delta_p, rms, loops.error(squares) / (2 * rms), "rms");
  const double share = loops.mean(same);
  expect_estimate(s.same_top, share, std::sqrt(share * (1 - share) / (loops.n - 1)), "same top");

  // 1001 values: every quantile told is one of them.
  const auto expect_quantiles = [](const Quantiles& found, std::vector<double> x) {
    std::sort(x.begin(), x.end());
    EXPECT_EQ(found.max, x[1000]);
    EXPECT_NEAR(found.p99_9, x[999], 1e-9);
    EXPECT_NEAR(found.p99, x[990], 1e-9);
    EXPECT_NEAR(found.p95, x[950], 1e-9);
    EXPECT_NEAR(found.p90, x[900], 1e-9);
    EXPECT_NEAR(found.p75, x[750], 1e-9);
    EXPECT_NEAR(found.median, x[500], 1e-9);
    EXPECT_NEAR(found.p25, x[250], 1e-9);
    EXPECT_NEAR(found.p10, x[100], 1e-9);
    EXPECT_NEAR(found.p5, x[50], 1e-9);
    EXPECT_NEAR(found.p1, x[10], 1e-9);
    EXPECT_NEAR(found.p0_1, x[1], 1e-9);
    EXPECT_EQ(found.min, x[0]);
  };
  expect_quantiles(s.kl_quantiles, kl);
  expect_quantiles(s.delta_p_quantiles, delta);
}

TEST(DivergenceStatistics, QuantilesAreLinearBetweenValues) {
  std::vector<TokenDivergence> tokens(3);
  tokens[0].kl = 8;
  tokens[1].kl = 0;
  tokens[2].kl = 4;
  const Quantiles kl = divergence_statistics(tokens).kl_quantiles;
  EXPECT_DOUBLE_EQ(kl.median, 4);
  EXPECT_DOUBLE_EQ(kl.p75, 6);
  EXPECT_DOUBLE_EQ(kl.p90, 7.2);
  EXPECT_DOUBLE_EQ(kl.p25, 2);
  EXPECT_DOUBLE_EQ(kl.min, 0);
  EXPECT_DOUBLE_EQ(kl.max, 8);
}

TEST(DivergenceStatistics, OneTokenHasNoErrors) {
  const TokenDivergence token{std::log(2.0F), std::log(4.0F), 0.5F, false};
  const DivergenceStatistics s = divergence_statistics({&token, 1});
  EXPECT_EQ(s.n_tokens, 1);
  EXPECT_NEAR(s.perplexity_base.value, 2, 1e-6);
  EXPECT_NEAR(s.perplexity_q.value, 4, 1e-6);
  EXPECT_NEAR(s.perplexity_ratio.value, 2, 1e-6);
  EXPECT_NEAR(s.perplexity_difference.value, 2, 1e-6);
  EXPECT_EQ(s.kl.value, 0.5);
  EXPECT_NEAR(s.delta_p.value, -0.25, 1e-6);
  EXPECT_NEAR(s.rms_delta_p.value, 0.25, 1e-6);
  EXPECT_EQ(s.kl_quantiles.p99_9, 0.5);
  EXPECT_EQ(s.kl_quantiles.min, 0.5);
  EXPECT_EQ(s.same_top.value, 0);
  EXPECT_EQ(s.ln_perplexity_correlation, 1);
  for (const Estimate& e :
       {s.perplexity_base, s.perplexity_q, s.ln_perplexity_ratio, s.perplexity_ratio,
        s.perplexity_difference, s.kl, s.delta_p, s.rms_delta_p, s.same_top}) {
    EXPECT_EQ(e.stderror, 0);
  }
}

TEST(DivergenceStatistics, ModelsThatAgreeInAllDivergeByNothing) {
  auto tokens = some_tokens(50);
  for (TokenDivergence& t : tokens) t = {t.nll_base, t.nll_base, 0, true};
  const DivergenceStatistics s = divergence_statistics(tokens);
  EXPECT_EQ(s.perplexity_base.value, s.perplexity_q.value);
  EXPECT_DOUBLE_EQ(s.ln_perplexity_correlation, 1);
  EXPECT_NEAR(s.perplexity_difference.stderror, 0, 1e-6 * s.perplexity_q.value);
  EXPECT_EQ(s.perplexity_ratio.value, 1);
  EXPECT_EQ(s.same_top.value, 1);
  for (const Estimate& e : {s.ln_perplexity_ratio, s.kl, s.delta_p, s.rms_delta_p}) {
    EXPECT_EQ(e.value, 0);
    EXPECT_EQ(e.stderror, 0);
  }
  EXPECT_EQ(s.kl_quantiles.max, 0);
  EXPECT_EQ(s.delta_p_quantiles.min, 0);
}

TEST(DivergenceStatistics, LossesThatDifferByLittleOfTheirSizeKeepTheirErrors) {
  std::vector<TokenDivergence> tokens;
  for (int i = 0; i < 1000; ++i) tokens.push_back({10.0F, 10.0F + (i % 2 == 0 ? 1e-3F : -1e-3F)});
  const double found = divergence_statistics(tokens).ln_perplexity_ratio.stderror;
  EXPECT_NEAR(found, 1e-3 / std::sqrt(999.0), 1e-6);
}

TEST(DivergenceStatistics, ATokenThatQRulesOutIsNotANumberNowhere) {
  std::vector<TokenDivergence> tokens = {{1, 200, 30, false}, {2, 2, 0, true}};
  const DivergenceStatistics s = divergence_statistics(tokens);
  EXPECT_NEAR(s.delta_p_quantiles.min, -std::exp(-1.0), 1e-7);
  EXPECT_TRUE(std::isfinite(s.perplexity_ratio.value));
}

TEST(DivergenceStatistics, NoTokenIsRefused) {
  EXPECT_THROW(divergence_statistics({}), InputError);
}

}  // namespace
}  // namespace moesaic::models
