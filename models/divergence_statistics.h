#pragma once

#include <cstdint>
#include <span>

namespace moesaic::models {

/// What a base model and another, Q, say about one token of a text that both were given.
struct TokenDivergence {
  float nll_base = 0, nll_q = 0;  // −ln p of the token that follows
  float kl = 0;                   // KL(p_base ‖ p_q) of the whole distribution, nats
  bool same_top = false;          // both find the same token most likely
};

/// A measured value and its standard error.
struct Estimate {
  double value = 0;
  double stderror = 0;
};

/// Quantiles of the tokens' values, linear between the order statistics: quantile f of n sorted
/// values stands at place f · (n − 1).
struct Quantiles {
  double max = 0, p99_9 = 0, p99 = 0, p95 = 0, p90 = 0, p75 = 0, median = 0, p25 = 0, p10 = 0,
         p5 = 0, p1 = 0, p0_1 = 0, min = 0;
};

/// What llama-perplexity --kl-divergence tells. The standard error of a mean of x is
/// √((E[x²] − E[x]²) / (n − 1)); those of what is computed from means are propagated to first
/// order, the covariance of the two models' losses counted, since both score the same tokens. 0 of
/// a single token.
struct DivergenceStatistics {
  std::int64_t n_tokens = 0;
  Estimate perplexity_base, perplexity_q;  // exp of the mean nll
  // Correlation of the two models' losses over tokens; 1 where both are constant or equal.
  double ln_perplexity_correlation = 1;
  Estimate ln_perplexity_ratio;    // mean of nll_q − nll_base
  Estimate perplexity_ratio;       // perplexity_q / perplexity_base
  Estimate perplexity_difference;  // perplexity_q − perplexity_base
  Estimate kl;                     // mean, nats
  Quantiles kl_quantiles;
  // Δp: probability of the token that follows, of Q less of base, in [−1, 1].
  Estimate delta_p;      // mean
  Estimate rms_delta_p;  // √ of the mean of Δp²
  Quantiles delta_p_quantiles;
  Estimate same_top;  // share of tokens, in [0, 1]
};

/// Statistics of at least one token, in double. Throws InputError for none.
DivergenceStatistics divergence_statistics(std::span<const TokenDivergence> tokens);

}  // namespace moesaic::models
