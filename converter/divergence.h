#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "converter/stream.h"
#include "models/transformer.h"

namespace moesaic::converter {

/// Mean KL divergence, nats, between the next-token distributions that two final residual streams
/// lead to, over every fourth position (neighbours say much the same).   dense, other [n_tokens,
/// d_model]. Throws FormatError if the logits are NaN or infinite.
double mean_divergence(models::Transformer& model, ConstMatrix dense, ConstMatrix other);

/// What a layer costs the model when something else stands in its place: the dense model's stream
/// over judging windows, layer by layer.
class Substitution {
 public:
  /// Runs the dense model over `tokens` [n_windows · n_ctx] once.
  Substitution(models::Transformer& model, std::span<const std::int32_t> tokens,
               std::int64_t n_ctx);

  /// The attention block of `layer`; layers come in order, each followed by pass().
  void attention(int layer) { dense_.attention(layer); }
  /// The dense stream before the MLP of the layer that attention() ran last.
  Stream& dense() { return dense_; }
  /// mean_divergence() with `replace` adding to the stream what stands in the place of the layer's
  /// MLP.
  double divergence(int layer, const std::function<void(Stream&)>& replace);
  /// Leaves the layer behind, dense.
  void pass(int layer) { dense_.mlp(layer, own(layer)); }

 private:
  const models::Mlp& own(int layer) const {
    return model_.checkpoint().layers[static_cast<std::size_t>(layer)].mlp;
  }

  models::Transformer& model_;
  Stream dense_, end_, other_;  // end_: behind the dense model's last layer
};

}  // namespace moesaic::converter
