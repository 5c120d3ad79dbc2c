#pragma once

#include <cstdint>

namespace moesaic::kernels {

/// How a token is drawn from a row of logits, the random number included. In this order: the top_k
/// largest logits, of these the fewest whose softmax sums to top_p, of these the ones at least
/// min_p times as likely as the first; the temperature; then the first, by falling logit (equal
/// ones by id; by id alone where neither top_k nor top_p cuts), at which the running sum of
/// likelihoods exceeds `random` times their total. NaN is never drawn.
struct Draw {
  float temperature = 0;   // 0: the largest logit, the lowest id on ties; nothing else counts
  std::int32_t top_k = 0;  // 0: off
  float top_p = 1;         // 1: off
  float min_p = 0;         // 0: off
  double random = 0;       // in [0, 1)
};

}  // namespace moesaic::kernels
