#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "converter/recovery/attention_block.h"
#include "converter/recovery/converted.h"
#include "converter/recovery/dense.h"
#include "models/transformer.h"

namespace moesaic::converter {

/// Where the milliseconds of a step go.
struct StepTimes {
  double attention_forward = 0, mlp_forward = 0, head = 0, mlp_backward = 0, attention_backward = 0;
};

/// A hybrid checkpoint as training sees it: embeddings, norms, head, dense MLPs and, unless
/// learn_attention() was called, attention frozen, the converted layers' parameters free. Forward
/// as models::Transformer, on windows of text that each begin at position 0; backward by hand. P:
/// Float64, Float32 or Bfloat16 (arithmetic.h).
template <class P>
class Hybrid {
 public:
  using Scalar = typename P::Scalar;
  using Operand = typename P::Operand;

  /// Unpacks the checkpoint. With `recompute`, a layer keeps nothing but its input between forward
  /// and backward, and runs a second time; without it every layer keeps its tape, about 30 ·
  /// d_ff bytes a token. Throws FormatError for NaN or infinite weights.
  Hybrid(const models::Checkpoint& checkpoint, Context& ctx, std::int64_t n_ctx, bool recompute);

  /// Takes the parameters over after they changed.
  void refresh();

  /// Takes over the parameters of a converted layer as a file holds them, the thresholds too.
  /// Throws ShapeError if it is another layer's form or shape.
  void replace(int layer, const models::Mlp& mlp);

  /// h = the final normed hidden states.   tokens [n] whole windows, h [n, d_model]
  void forward(std::span<const std::int32_t> tokens, MatrixView<Operand> h);

  struct Losses {
    double kl = 0;         // Σ over rows
    double auxiliary = 0;  // regression loss of the routers, mean over secret-MoE layers
  };

  /// KL divergence from the teacher, Σ over rows, and no gradients. `teacher` [n, d_model]: the
  /// dense model's final normed hidden states.
  double divergence(std::span<const std::int32_t> tokens, MatrixView<const Operand> teacher);

  /// Adds to the gradients those of
  ///   Σ_t KL_t / n_step + Σ_layers auxiliary regression loss (moe.h), weights ω_t / n_step,
  /// ω_t = 1 / ‖residual stream before the MLP‖² (over mean(y²) too where a norm follows the MLP),
  /// scaled to mean 1 over the rows given. n_step: rows of the whole step.
  Losses gradients(std::span<const std::int32_t> tokens, MatrixView<const Operand> teacher,
                   std::int64_t n_step);

  /// Gives the attention's matrices of all layers behind the first converted one updates of that
  /// rank (low_rank_update.h); what lies before it meets no gradient.
  void learn_attention(std::int64_t rank, std::uint64_t seed);
  AttentionBlock<P>& attention(int layer) {
    return *layers_[static_cast<std::size_t>(layer)].attention;
  }

  /// Converted layers, in order.
  std::vector<Converted<P>>& converted() { return converted_; }

  /// Multiply-adds of the MLPs over those of dense ones, mean over all layers; those of self-routed
  /// layers as counted in every pass since forget_counts().
  double active_fraction() const;
  void forget_counts();

  /// Called in gradients() for each secret-MoE layer before its backward, with the operands x and c
  /// of its first `contribution_rows` rows and their weights ω.
  using ContributionObserver =
      std::function<void(std::size_t index, MatrixView<const Operand> x,
                         MatrixView<const Operand> c, std::span<const Scalar> weight)>;
  void observe(std::int64_t contribution_rows, ContributionObserver observer) {
    contribution_rows_ = contribution_rows;
    observer_ = std::move(observer);
  }

  /// Called in forward() for each secret-MoE layer with its operands x [n, d_model] and f
  /// [n, n_neurons] (mask ⊙ (activations − μ)) and ω, while set.
  using FeatureObserver =
      std::function<void(std::size_t index, MatrixView<const Operand> x,
                         MatrixView<const Operand> f, std::span<const Scalar> weight)>;
  void observe_features(FeatureObserver observer) { feature_observer_ = std::move(observer); }

  /// Called in forward() for each self-routed layer with its input x [n, d_model] and ω, while set,
  /// before its output is computed for good: may replace() the layer.
  using InputObserver = std::function<void(std::size_t index, MatrixView<const Scalar> x,
                                           std::span<const Scalar> weight)>;
  void observe_inputs(InputObserver observer) { input_observer_ = std::move(observer); }

  MatrixView<const Operand> head() const { return head_.view(); }
  StepTimes& times() { return times_; }
  int first_converted() const { return converted_.empty() ? n_layers() : converted_.front().layer; }
  int n_layers() const { return static_cast<int>(layers_.size()); }

 private:
  struct Layer {
    std::unique_ptr<AttentionBlock<P>> attention;
    std::vector<Scalar> mlp_norm, post_mlp_norm;
    DenseLayer<P> dense;
    std::optional<std::size_t> converted;  // index
    double active = 1;  // multiply-adds over the dense MLP's, unless they vary with the token
  };
  struct Tape {
    AttentionTape<P> attention;
    Storage<Scalar> r_mid;    // the stream before the MLP
    Storage<Scalar> mlp_out;  // where a norm follows
    MoeTape<P> moe;
    SelfRoutedTape<P> self_routed;
    DenseTape<P> dense;
  };

  void load_layer(const models::Checkpoint& checkpoint, int index);
  void run_layer(int index, MatrixView<Scalar> r, Tape& tape, std::int64_t contribution_rows);
  void mlp_forward(const Layer& layer, MatrixView<const Scalar> r, MatrixView<const Scalar> x,
                   std::int64_t contribution_rows, Tape& tape, MatrixView<Scalar> y);
  double mlp_backward_block(Layer& layer, std::int64_t n_step, Tape& tape, bool need_dr,
                            MatrixView<Scalar> dr);
  std::vector<Scalar> weights(MatrixView<const Scalar> r, MatrixView<const Scalar> y) const;
  Tape& tape(int index) { return tapes_[recompute_ ? 0 : static_cast<std::size_t>(index)]; }
  void run_layers(std::span<const std::int32_t> tokens, MatrixView<Scalar> r, bool keep);

  models::ModelConfig config_;
  Context& ctx_;
  std::int64_t n_ctx_;
  bool recompute_;
  Scalar eps_;
  std::shared_ptr<const models::GgufFile> file_;  // what the embedding's view points into
  WeightView embedding_;
  std::vector<Scalar> output_norm_;
  Storage<Operand> head_;
  std::map<double, RotaryTable<Scalar>> rotaries_;
  std::vector<Layer> layers_;
  std::vector<Converted<P>> converted_;
  std::vector<Tape> tapes_;
  std::vector<Storage<Scalar>> inputs_;  // [n_layers] the stream before each layer
  std::int64_t contribution_rows_ = 0;
  ContributionObserver observer_;
  FeatureObserver feature_observer_;
  InputObserver input_observer_;
  StepTimes times_;
};

}  // namespace moesaic::converter
