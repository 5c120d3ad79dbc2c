#pragma once

#include <cstdint>
#include <vector>

#include "kernels/secret_moe.h"

namespace moesaic::reference {

/// The layer by its definition, in double. An error of ε in each operand of the products changes a
/// value by at most a few ε times its magnitude (first order).
struct SecretMoe {
  std::vector<double> y;                // [n_tokens, d_model]
  std::vector<double> magnitude;        // [n_tokens, d_model]
  std::vector<double> scores;           // [n_tokens, n_experts]
  std::vector<double> score_magnitude;  // [n_tokens, n_experts]
};

/// Runs the experts `selected` [n_tokens, n_active] and not the scores' own top k: rounding may
/// decide a near tie either way, and the rest of the layer can be compared all the same.
SecretMoe secret_moe(const kernels::SecretMoeView& layer, ConstMatrix x,
                     const std::vector<std::int32_t>& selected);

/// Bytes that one token's selection reads by the contract.
struct MoeBytes {
  std::int64_t router = 0;
  std::int64_t experts = 0;
};
MoeBytes gather_bytes(const kernels::SecretMoeView& layer, std::int64_t n_tokens);
MoeBytes grouped_bytes(const kernels::SecretMoeView& layer, const std::vector<std::int32_t>& ids);

}  // namespace moesaic::reference
