#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "engine/decoder.h"
#include "kernels/base/context.h"
#include "kernels/base/huge_buffer.h"
#include "kernels/linear.h"
#include "models/config.h"
#include "models/gguf.h"
#include "models/mlp.h"
#include "models/tokenizer.h"

namespace moesaic::models {

/// Weights of one decoder layer, borrowed from the mapping. Norm weights are F32 vectors.
struct LayerWeights {
  std::span<const float> attn_norm;       // [d_model]
  WeightView w_q;                         // [n_heads · head_dim, d_model]
  WeightView w_k;                         // [n_kv_heads · head_dim, d_model]
  WeightView w_v;                         // [n_kv_heads · head_dim, d_model]
  WeightView w_o;                         // [d_model, n_heads · head_dim]
  std::span<const float> q_norm, k_norm;  // [head_dim] or empty
  std::span<const float> post_attn_norm;  // [d_model] or empty
  std::span<const float> mlp_norm;        // [d_model]
  std::span<const float> post_mlp_norm;   // [d_model] or empty
  Mlp mlp;
};

/// A loaded checkpoint: file, configuration, weights. Immutable, shared between decoders.
struct Checkpoint {
  std::shared_ptr<const GgufFile> file;
  ModelConfig config;
  WeightView embedding;                // [vocab_size, d_model]
  std::span<const float> output_norm;  // [d_model]
  WeightView head;                     // [vocab_size, d_model]; the embedding where tied
  std::vector<LayerWeights> layers;
  std::shared_ptr<const HugeBuffer> panels;  // what the views' panels point into, or null

  /// Opens, checks every expected tensor's presence, type and shape. Throws FormatError, IoError.
  static std::shared_ptr<const Checkpoint> load(const std::filesystem::path& path);

  /// Mean over layers of multiply_adds(layer) / (3 · d_model · d_ff): 1 for a dense model.
  double active_fraction() const;
};

/// Runs a checkpoint (dense or hybrid) as a pre-norm decoder:
///   r += post_attn_norm?(W_o attention(rope(q_norm?(W_q n)), …)),  n = attn_norm(r)
///   r += post_mlp_norm?(mlp(mlp_norm(r)))
///   logits = head · output_norm(r)
/// The pieces are public, because the converter runs the model layer by layer.
class Transformer : public engine::Decoder {
 public:
  Transformer(std::shared_ptr<const Checkpoint> checkpoint, Context& ctx);

  const Checkpoint& checkpoint() const { return *checkpoint_; }
  const ModelConfig& config() const { return checkpoint_->config; }
  Context& context() { return ctx_; }

  // engine::Decoder
  engine::DecoderShape shape() const override { return config().shape(); }
  void forward(const engine::Batch& batch, engine::KvCache& cache, Matrix logits) override;

  /// forward() without the head: the first batch.outputs.size() rows of r [n_tokens, d_model]
  /// receive the residual stream of the rows in batch.outputs after the last layer; the others are
  /// scratch. Rows that nobody wants only leave their keys and values in the last layer (all rows
  /// run to the end while an observer is set). Throws as forward().
  void run_layers(const engine::Batch& batch, engine::KvCache& cache, Matrix r);

  // The steps of forward(), r [n_tokens, d_model] being the residual stream.
  void embed(std::span<const std::int32_t> tokens, Matrix r);
  void attention_block(int layer, const kernels::TokenPlaces& places, kernels::KvLayerView cache,
                       Matrix r);
  void mlp_input(int layer, ConstMatrix r, Matrix x);  // x = mlp_norm(r)
  void add_mlp_output(int layer, Matrix y, Matrix r);  // r += post_mlp_norm?(y); y is scratch after
  void head(ConstMatrix r, Matrix logits);             // logits [rows of r, vocab_size]

  /// Called per layer with the selected expert ids [n_tokens, n_active] of a secret-MoE layer,
  /// while set.
  using SelectionObserver =
      std::function<void(int layer, std::int64_t n_tokens, std::span<const std::int32_t>)>;
  void set_selection_observer(SelectionObserver observer) { observer_ = std::move(observer); }

 private:
  // The two halves of attention_block(): keys and values of all rows of r go to the cache, queries
  // (where asked for) to an output; and what queries read there is added to r. q is scratch after.
  kernels::LinearInput attention_input(int layer, ConstMatrix r) const;
  void project_and_store(int layer, const kernels::TokenPlaces& places, kernels::KvLayerView cache,
                         ConstMatrix r, const kernels::LinearOutput& queries);
  void attend(int layer, const kernels::TokenPlaces& places, kernels::KvLayerView cache, Matrix q,
              Matrix r);
  void mlp_block(int layer, Matrix r);
  // What the first product of a layer reads, or of the head after the last one.
  kernels::Upcoming first_weights(int layer) const;

  std::shared_ptr<const Checkpoint> checkpoint_;
  Context& ctx_;
  std::vector<std::vector<float>> rope_freq_;  // [n_layers][head_dim / 2]
  SelectionObserver observer_;
};

}  // namespace moesaic::models
