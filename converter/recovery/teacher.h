#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine/kv_cache.h"
#include "models/transformer.h"

namespace moesaic::converter {

/// The dense model's final normed hidden states of windows of text, computed when first asked for
/// and kept in bfloat16. Each window is computed alone, so that what it gives does not depend on
/// which windows came before.
class Teacher {
 public:
  /// tokens [n_windows · n_ctx], borrowed. Takes 2 · tokens.size() · d_model bytes once all windows
  /// were asked for.
  Teacher(std::shared_ptr<const models::Checkpoint> dense, Context& ctx,
          std::span<const std::int32_t> tokens, std::int64_t n_ctx);

  /// [n_ctx, d_model] raw bfloat16.
  MatrixView<const std::uint16_t> hidden(std::int64_t window);

  double seconds() const { return seconds_; }  // spent in the dense model so far

 private:
  Context ctx_;
  models::Transformer model_;
  std::span<const std::int32_t> tokens_;
  std::int64_t n_ctx_;
  engine::HostKvCache cache_;
  std::vector<std::int32_t> slots_, positions_;
  std::vector<float> r_;                          // [n_ctx, d_model]
  std::vector<std::vector<std::uint16_t>> kept_;  // per window, empty until asked for
  double seconds_ = 0;
};

}  // namespace moesaic::converter
