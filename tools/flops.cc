#include "tools/flops.h"

#include <algorithm>

namespace moesaic::tools {
namespace {

double elements(const WeightView& w) {
  return static_cast<double>(w.rows) * static_cast<double>(w.cols);
}

/// FLOP of one token at `position`, with or without its logits.
double token_flops(const models::Checkpoint& checkpoint, std::int64_t position, bool logits) {
  const models::ModelConfig& config = checkpoint.config;
  double multiply_adds = logits ? elements(checkpoint.head) : 0;
  for (std::size_t i = 0; i < checkpoint.layers.size(); ++i) {
    const models::LayerWeights& layer = checkpoint.layers[i];
    multiply_adds += elements(layer.w_k) + elements(layer.w_v);
    if (!logits && i + 1 == checkpoint.layers.size()) break;
    const std::int64_t window = config.layers[i].window;
    const std::int64_t keys = window > 0 ? std::min(window, position + 1) : position + 1;
    multiply_adds += elements(layer.w_q) + elements(layer.w_o) +
                     static_cast<double>(models::multiply_adds(layer.mlp)) +
                     2.0 * config.n_heads * config.head_dim * static_cast<double>(keys);
  }
  return 2 * multiply_adds;
}

}  // namespace

double flops_per_token(const models::Checkpoint& checkpoint, const engine::Work& work) {
  const bool prefill = work.n_prompt > 0;
  const std::int64_t n = work.n_prompt + work.n_gen;
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    sum += token_flops(checkpoint, work.depth + i, !prefill || i + 1 == n);
  }
  return sum / static_cast<double>(n);
}

}  // namespace moesaic::tools
