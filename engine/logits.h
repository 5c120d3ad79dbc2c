#pragma once

#include <cstdint>
#include <span>

namespace moesaic::engine {

/// Largest logit; NaN counts as −∞. −∞ for none.
float max_logit(std::span<const float> logits);

/// Index of the largest logit; the lowest index on ties; NaN counts as −∞.
std::int32_t argmax(std::span<const float> logits);

/// log Σ exp(logits), with the maximum subtracted. Exponentials in float32 (relative error below
/// 1e-6), their sum in double. NaN if any logit is.
double log_sum_exp(std::span<const float> logits);

/// KL(p ‖ q) = Σ p_i (ln p_i − ln q_i) of two distributions over the same ids, given as logits and
/// their log_sum_exp. Differences and sum in double, p_i as in log_sum_exp.
double kl_divergence(std::span<const float> p, double lse_p, std::span<const float> q,
                     double lse_q);

}  // namespace moesaic::engine
