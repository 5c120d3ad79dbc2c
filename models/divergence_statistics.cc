#include "models/divergence_statistics.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/base/error.h"

namespace moesaic::models {
namespace {

using Values = std::vector<double>;

double mean(const Values& x) {
  double sum = 0;
  for (const double v : x) sum += v;
  return sum / static_cast<double>(x.size());
}

// Covariance of the means of x and y (with x = y: the mean's squared standard error), sums about
// the means: tokens' losses differ by less than their size, and squares would cancel.
double covariance_of_means(const Values& x, const Values& y) {
  if (x.size() < 2) return 0;
  const double mean_x = mean(x);
  const double mean_y = mean(y);
  double sum = 0;
  for (std::size_t i = 0; i < x.size(); ++i) sum += (x[i] - mean_x) * (y[i] - mean_y);
  const auto n = static_cast<double>(x.size());
  return sum / n / (n - 1);
}

Estimate mean_estimate(const Values& x) { return {mean(x), std::sqrt(covariance_of_means(x, x))}; }

double quantile(const Values& sorted, double fraction) {
  const double place = fraction * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, sorted.size() - 1);
  const double part = place - static_cast<double>(below);
  return sorted[below] + part * (sorted[above] - sorted[below]);
}

Quantiles quantiles(Values x) {
  std::sort(x.begin(), x.end());
  const auto at = [&](double fraction) { return quantile(x, fraction); };
  return {.max = x.back(),
          .p99_9 = at(0.999),
          .p99 = at(0.99),
          .p95 = at(0.95),
          .p90 = at(0.9),
          .p75 = at(0.75),
          .median = at(0.5),
          .p25 = at(0.25),
          .p10 = at(0.1),
          .p5 = at(0.05),
          .p1 = at(0.01),
          .p0_1 = at(0.001),
          .min = x.front()};
}

template <class Fn>
Values column(std::span<const TokenDivergence> tokens, Fn&& fn) {
  Values x;
  x.reserve(tokens.size());
  for (const TokenDivergence& token : tokens) x.push_back(fn(token));
  return x;
}

// Perplexities and how they go together.
void add_perplexities(std::span<const TokenDivergence> tokens, DivergenceStatistics& s) {
  const Values base = column(tokens, [](const auto& t) { return double{t.nll_base}; });
  const Values q = column(tokens, [](const auto& t) { return double{t.nll_q}; });
  const double of_base = covariance_of_means(base, base);
  const double of_q = covariance_of_means(q, q);
  const double of_both = covariance_of_means(base, q);
  const double ppl_base = std::exp(mean(base));
  const double ppl_q = std::exp(mean(q));
  s.perplexity_base = {ppl_base, ppl_base * std::sqrt(of_base)};
  s.perplexity_q = {ppl_q, ppl_q * std::sqrt(of_q)};
  if (of_base > 0 && of_q > 0) {
    s.ln_perplexity_correlation = std::clamp(of_both / std::sqrt(of_base * of_q), -1.0, 1.0);
  } else {
    s.ln_perplexity_correlation = of_base == of_q ? 1 : 0;
  }
  s.ln_perplexity_ratio =
      mean_estimate(column(tokens, [](const auto& t) { return double{t.nll_q} - t.nll_base; }));
  const double ratio = std::exp(s.ln_perplexity_ratio.value);
  s.perplexity_ratio = {ratio, ratio * s.ln_perplexity_ratio.stderror};
  const double variance =
      ppl_q * ppl_q * of_q + ppl_base * ppl_base * of_base - 2 * ppl_q * ppl_base * of_both;
  s.perplexity_difference = {ppl_q - ppl_base, std::sqrt(std::max(variance, 0.0))};
}

// The change in the probability of the token that follows.
void add_delta_p(std::span<const TokenDivergence> tokens, DivergenceStatistics& s) {
  Values delta = column(tokens, [](const auto& t) {
    return std::exp(-double{t.nll_q}) - std::exp(-double{t.nll_base});
  });
  Values squares = delta;
  for (double& v : squares) v *= v;
  const Estimate square = mean_estimate(squares);
  const double rms = std::sqrt(square.value);
  s.delta_p = mean_estimate(delta);
  s.rms_delta_p = {rms, rms > 0 ? square.stderror / (2 * rms) : 0};
  s.delta_p_quantiles = quantiles(std::move(delta));
}

}  // namespace

DivergenceStatistics divergence_statistics(std::span<const TokenDivergence> tokens) {
  require<InputError>(!tokens.empty(), "no token was scored, expected at least one");
  DivergenceStatistics s;
  s.n_tokens = static_cast<std::int64_t>(tokens.size());
  add_perplexities(tokens, s);
  Values kl = column(tokens, [](const auto& t) { return double{t.kl}; });
  s.kl = mean_estimate(kl);
  s.kl_quantiles = quantiles(std::move(kl));
  add_delta_p(tokens, s);
  // A share is the mean of zeros and ones, and so is its error.
  s.same_top = mean_estimate(column(tokens, [](const auto& t) { return t.same_top ? 1.0 : 0.0; }));
  return s;
}

}  // namespace moesaic::models
