#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/kv_cache.h"
#include "kernels/base/aligned_buffer.h"
#include "models/transformer.h"

namespace moesaic::converter {

/// The residual stream of windows of tokens on its way through a model, layer by layer: all that
/// calibration keeps.
class Stream {
 public:
  /// Embeds n_windows windows of n_ctx tokens; each is a sequence of its own. 4 · tokens.size() ·
  /// d_model bytes.
  Stream(models::Transformer& model, std::span<const std::int32_t> tokens, std::int64_t n_ctx);

  /// r += attention block of `layer`, window by window.
  void attention(int layer);
  /// x = mlp_norm(r) for all rows.   x [n_tokens, d_model]
  void mlp_input(int layer, Matrix x);
  /// r += post_norm?(mlp(mlp_norm(r))), with `mlp` in the place of the layer's own.
  void mlp(int layer, const models::Mlp& mlp);
  /// The same for a y that is already known.   y [n_tokens, d_model], overwritten.
  void add_mlp_output(int layer, Matrix y);

  Matrix r() { return {r_.data(), n_tokens_, d_model_}; }
  std::int64_t n_tokens() const { return n_tokens_; }

 private:
  models::Transformer& model_;
  std::int64_t n_tokens_;
  std::int64_t d_model_;
  std::int64_t n_ctx_;
  AlignedBuffer<float> r_;                       // [n_tokens, d_model]
  engine::HostKvCache cache_;                        // one layer of kWindows windows
  std::vector<std::int32_t> slots_, positions_;  // places of kWindows windows
};

/// y = mlp(x) in tiles of rows.   x, y [n_tokens, d_model]
void forward_rows(Context& ctx, const models::Mlp& mlp, ConstMatrix x, Matrix y);

}  // namespace moesaic::converter
