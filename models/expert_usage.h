#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/monitor.h"
#include "models/transformer.h"

namespace moesaic::models {

/// Experts that the layer chooses from per token: those behind a router, the neurons of a
/// self-routed layer, none of a dense MLP.
std::int64_t n_experts(const Mlp& mlp);

/// How often each expert fired: was selected by the router, was kept (self-routed).
struct ExpertUsage {
  std::int64_t n_tokens = 0;
  std::vector<std::vector<std::int64_t>> counts;  // [n_layers][n_experts], empty for a dense layer
};

/// Runs `tokens` in windows of n_ctx, each a sequence of its own, the last as long as what remains.
/// Throws InputError for no tokens, ids outside the vocabulary, or n_ctx beyond 1 to the model's
/// context.
ExpertUsage count_experts(Transformer& model, std::span<const std::int32_t> tokens,
                          std::int64_t n_ctx, engine::Monitor& monitor);

struct ExpertId {
  int layer = 0;
  std::int64_t expert = 0;
};

/// One token that fired an expert.
struct Firing {
  std::int64_t place = 0;   // of the token among all that were given
  double contribution = 0;  // ‖what the expert added to the layer's output‖
};

/// For each of `experts` the (at most) n firings of the largest contribution, largest first, the
/// earlier token on ties: |f_i(x) − μ_i| ‖w_down,i‖ for a secret MoE, |f_i(x)| ‖w_down,i‖ for a
/// self-routed layer, the length of what the gated expert adds in a mixture. Windows and errors as
/// above, and InputError for an expert that the layer does not have.
std::vector<std::vector<Firing>> strongest_firings(Transformer& model,
                                                   std::span<const std::int32_t> tokens,
                                                   std::int64_t n_ctx,
                                                   std::span<const ExpertId> experts, std::size_t n,
                                                   engine::Monitor& monitor);

}  // namespace moesaic::models
