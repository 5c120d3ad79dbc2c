#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "kernels/base/view.h"
#include "models/transformer.h"

namespace moesaic::converter {

/// Rows of a stream on their way through an MLP, in host memory.   all [n, d_model]; r and y
/// without rows: not wanted
struct MlpRows {
  Matrix r = {};  // the stream before the MLP
  Matrix x = {};  // mlp_norm(r)
  Matrix y = {};  // the checkpoint's own MLP of x
};

/// The residual stream r [n_tokens, d_model] of windows of tokens on its way through a model, layer
/// by layer: all that calibration keeps. In host memory or a device's, whose losses and copies
/// throw DeviceError; Passes makes them.
class Stream {
 public:
  virtual ~Stream() = default;

  virtual std::int64_t n_tokens() const = 0;
  /// r += attention block of `layer`, window by window.
  virtual void attention(int layer) = 0;
  /// n rows before the MLP of `layer`, spread evenly: row i is that of token i · n_tokens / n.
  virtual void mlp_rows(int layer, const MlpRows& rows) = 0;
  /// r += post_norm?(mlp(mlp_norm(r))), with `mlp` in the place of the layer's own.
  virtual void mlp(int layer, const models::Mlp& mlp) = 0;
  /// The same for a y that is already known.   y [n_tokens, d_model], scratch afterwards.
  virtual void add_mlp_output(int layer, Matrix y) = 0;
  /// Rows of r from `first` on.   rows [n, d_model], host memory
  virtual void read(std::int64_t first, Matrix rows) = 0;
  /// r = other's, a stream of the same passes with as many tokens.
  virtual void assign(const Stream& other) = 0;
  /// mean_divergence() (divergence.h) of the distributions that `other`, such a stream too, leads
  /// to from those that this one does, both behind the last layer. Throws FormatError.
  virtual double divergence(const Stream& other) = 0;
};

/// What streams of one model run through.
class Passes {
 public:
  explicit Passes(models::Transformer& model) : model_(model) {}
  virtual ~Passes() = default;

  models::Transformer& model() const { return model_; }
  /// The layer's own MLP in the checkpoint.
  const models::Mlp& own_mlp(int layer) const {
    return model_.checkpoint().layers[static_cast<std::size_t>(layer)].mlp;
  }
  /// Embeds windows of n_ctx tokens; each is a sequence of its own. 4 · tokens.size() · d_model
  /// bytes. Gone before the passes are.
  virtual std::unique_ptr<Stream> stream(std::span<const std::int32_t> tokens,
                                         std::int64_t n_ctx) = 0;

 private:
  models::Transformer& model_;
};

/// On the CPU.
class HostPasses : public Passes {
 public:
  using Passes::Passes;
  std::unique_ptr<Stream> stream(std::span<const std::int32_t> tokens, std::int64_t n_ctx) override;
};

/// y = mlp(x) in tiles of rows.   x, y [n_tokens, d_model]
void forward_rows(Context& ctx, const models::Mlp& mlp, ConstMatrix x, Matrix y);

}  // namespace moesaic::converter
