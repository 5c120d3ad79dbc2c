#pragma once

#include <cstdint>
#include <vector>

#include "kernels/self_routed.h"

namespace moesaic::reference {

/// How exact a product is: an error of `element` times each entry of its vector, of `unit` times
/// the largest of the entry's 32, of `sum` times the sum of its terms' absolute values. With `bf16`
/// weights and entries are first rounded to bfloat16, an entry to either side of a border between
/// two that it is within its error of.
struct Precision {
  double element = 0;
  double unit = 0;
  double sum = 0;
  bool bf16 = false;
};

/// The layer by its definition, in double.
struct SelfRouted {
  std::vector<double> y;      // [n_tokens, d_model]
  std::vector<double> error;  // [n_tokens, d_model], what the products' errors may change, neurons
                              // within reach of a threshold on either side of it
  // What is above its threshold; per token, ascending.
  std::vector<std::vector<std::int64_t>> inputs, routed, kept;
  std::int64_t n_doubtful = 0;  // neurons within reach of a threshold
};
SelfRouted self_routed(const kernels::SelfRoutedView& layer, ConstMatrix x, const Precision& gate,
                       const Precision& up, const Precision& down);

/// By the lists.
std::int64_t multiply_adds(const kernels::SelfRoutedView& layer, const SelfRouted& result);

}  // namespace moesaic::reference
