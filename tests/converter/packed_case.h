#pragma once

#include <cstddef>
#include <cstdint>
#include <random>

#include "converter/convert.h"
#include "models/config.h"
#include "models/secret_moe_file.h"

namespace moesaic::converter {

/// Sizes of a converted layer that fits tests/models/tiny_model.h: d_model 64, d_ff 96.
inline models::ModelConfig small_config(int n_layers) {
  models::ModelConfig config;
  config.architecture = "llama";
  config.n_layers = n_layers;
  config.d_model = 64;
  config.d_ff = 96;
  return config;
}

/// A packed layer of random bytes that are valid weights (small integers in bf16).
inline models::PackedSecretMoe packed_layer(std::uint64_t seed, std::int64_t n_shared = 16,
                                            std::int64_t bypass_rank = 8) {
  std::mt19937_64 rng(seed);
  models::PackedSecretMoe p;
  p.n_active = 24;
  p.d_model = 64;
  p.n_shared = n_shared;
  p.n_experts = 96 - n_shared;
  p.router_rank = 8;
  p.bypass_rank = bypass_rank;
  const auto weights = [&](std::int64_t n) {
    AlignedBuffer<std::byte> b(static_cast<std::size_t>(2 * n));
    for (std::size_t i = 0; i < b.size(); i += 2) {
      b[i] = static_cast<std::byte>(rng() % 256);
      b[i + 1] = static_cast<std::byte>(0x3c + rng() % 4);
    }
    return b;
  };
  const auto floats = [&](std::int64_t n) {
    AlignedBuffer<float> b(static_cast<std::size_t>(n));
    for (float& v : b) v = static_cast<float>(rng() % 1000) / 1000;
    return b;
  };
  p.shared = weights(3 * p.n_shared * p.d_model);
  p.experts = weights(3 * p.n_experts * p.d_model);
  p.router_v = weights(p.router_rank * p.d_model);
  p.router_u = weights(p.n_experts * p.router_rank);
  p.bypass_q = weights(p.bypass_rank * p.d_model);
  p.bypass_p = weights(p.d_model * p.bypass_rank);
  p.expert_mean = floats(p.n_experts);
  p.router_bias = floats(p.n_experts);
  p.bias = floats(p.d_model);
  return p;
}

inline LayerReport packed_report(int layer, const models::PackedSecretMoe& p) {
  LayerReport r;
  r.layer = layer;
  r.kind = models::kKindGluLowRank;
  r.n_shared = p.n_shared;
  r.n_experts = p.n_experts;
  r.n_active = p.n_active;
  r.router_rank = p.router_rank;
  r.bypass_rank = p.bypass_rank;
  r.active_fraction = 0.1 + 1.0 / 3;
  r.sensitivity = 1e-17 + 0.02 * layer;
  r.error_closed_form = 0.2 + layer * 1e-3;
  r.error_distilled = 0.1 + layer * 1e-3;
  for (std::int64_t i = 0; i < p.n_experts; ++i) {
    r.expert_usage.push_back(static_cast<float>(i) / static_cast<float>(p.n_experts));
  }
  return r;
}

inline LayerReport dense_report(int layer) {
  LayerReport r;
  r.layer = layer;
  r.kind = models::kKindDense;
  r.sensitivity = 0.5;
  return r;
}

}  // namespace moesaic::converter
