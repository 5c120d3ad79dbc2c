#pragma once

#include <cstdint>
#include <vector>

#include "kernels/mixture.h"

namespace moesaic::reference {

/// The layer by its definition, in double. An error of ε in each operand of the products changes a
/// value by at most a few ε times its magnitude (first order).
struct Mixture {
  std::vector<double> y;                // [n_tokens, d_model]
  std::vector<double> magnitude;        // [n_tokens, d_model]
  std::vector<double> scores;           // [n_tokens, n_experts]
  std::vector<double> score_magnitude;  // [n_tokens, n_experts]
  std::vector<double> gates;            // [n_tokens, n_active]
  std::vector<double> gate_magnitude;   // [n_tokens, n_active]
};

/// Runs the experts `selected` [n_tokens, n_active] and not the scores' own top k: rounding may
/// decide a near tie either way, and the rest of the layer can be compared all the same.
Mixture mixture(const kernels::MixtureView& layer, ConstMatrix x,
                const std::vector<std::int32_t>& selected);

}  // namespace moesaic::reference
