#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "converter/stream.h"
#include "models/transformer.h"

namespace moesaic::converter {

/// Mean KL divergence, nats, between the next-token distributions that two final residual streams
/// lead to, over every fourth position (neighbours say much the same).   dense, other [n_tokens,
/// d_model]. Throws FormatError if the logits are NaN or infinite.
double mean_divergence(models::Transformer& model, ConstMatrix dense, ConstMatrix other);

/// Which those are: the last one of each four.
inline constexpr std::int64_t kJudgedStep = 4;

/// The mean, if it is finite; else throws as mean_divergence().
double checked_divergence(const models::Transformer& model, double mean);

/// What a layer costs the model when something else stands in its place: the dense model's stream
/// over judging windows, layer by layer.
class Substitution {
 public:
  /// Runs the dense model over `tokens` [n_windows · n_ctx] once.
  Substitution(Passes& passes, std::span<const std::int32_t> tokens, std::int64_t n_ctx);

  /// The attention block of `layer`; layers come in order, each followed by pass().
  void attention(int layer) { dense_->attention(layer); }
  /// The dense stream before the MLP of the layer that attention() ran last.
  Stream& dense() { return *dense_; }
  /// mean_divergence() with `replace` adding to the stream what stands in the place of the layer's
  /// MLP.
  double divergence(int layer, const std::function<void(Stream&)>& replace);
  /// Leaves the layer behind, dense.
  void pass(int layer) { dense_->mlp(layer, passes_.own_mlp(layer)); }

 private:
  Passes& passes_;
  std::unique_ptr<Stream> dense_, end_, other_;  // end_: behind the dense model's last layer
};

}  // namespace moesaic::converter
