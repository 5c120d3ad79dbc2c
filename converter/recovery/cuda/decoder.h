#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "converter/recovery/attention_block.h"
#include "converter/recovery/cuda/memory.h"
#include "converter/recovery/moe.h"
#include "converter/recovery/self_routed.h"
#include "kernels/cuda/base/blas.h"
#include "kernels/cuda/base/stream.h"
#include "kernels/cuda/training/gated_mlp.h"
#include "kernels/cuda/training/window_attention.h"
#include "models/transformer.h"

namespace moesaic::converter {

/// What a layer's way back needs from its way forward (dense.h, self_routed.h, moe.h,
/// attention_block.h).
struct CudaTape {
  std::span<float> q, k, v;       // after norms and rotation
  std::span<float> q_raw, k_raw;  // before them, where heads are normed
  std::span<float> mixed, lse;    // attention's output before W_o
  std::span<float> out, mlp_out;  // W_o's and W_down's, where norms follow
  std::span<float> r_mid;         // the stream before the MLP
  std::span<std::uint16_t> x, large, h, slope_gate, slope_up;
  std::span<std::uint8_t> mask;
  // Of secret-MoE layers, whose f stands in h: [rows, n_experts], [rows, router_rank], [rows,
  // bypass_rank], [rows]
  std::span<std::uint16_t> gap, centred, kappa, z, qx;
  std::span<double> squared_gap;

  /// Of a layer with this mixture; none has no experts.
  void walk(DeviceParts& take, const models::ModelConfig& config, const MoeShape& moe,
            std::int64_t rows);
};

/// The largest sizes of a checkpoint's secret-MoE layers, each on its own; 0 where it has none.
MoeShape largest_moe(const models::Checkpoint& checkpoint);

/// What CudaScratch is for.
enum class CudaWork {
  Forward,   // layers and divergences
  Training,  // gradients, too
};

/// Memory that layers use again and again, enough for so many rows of such a checkpoint; a hybrid's
/// dense model shares it.
class CudaScratch {
 public:
  CudaScratch(const models::Checkpoint& checkpoint, std::int64_t rows, std::int64_t n_ctx,
              CudaWork work);

  std::int64_t rows, n_ctx, head_rows;                 // rows of a tile of logits
  std::span<float> r, dr, x, y;                        // [rows, d_model]
  std::span<float> gate, up;                           // [rows, d_ff or n_neurons]
  std::span<float> d_mixed, dq, dk, dv;                // [rows, heads · head_dim]
  std::span<float> attention;                          // window_attention()'s workspace
  std::span<float> teacher_logits, logits;             // [head_rows, vocab_size]
  std::span<double> divergence;                        // [rows]
  std::span<std::uint16_t> operand, hidden, d_logits;  // [rows, d_model or heads], …
  std::span<std::int32_t> positions;                   // [rows]
  std::span<cuda::Count> ignored;                      // counts that nobody wants
  // Of secret-MoE layers: V x and ∂L/∂ that or ∂L/∂(Q x), [rows, ranks], and that as an operand;
  // scores and their choice [rows, n_experts], [rows, n_active]; ω [rows]
  std::span<float> ranks, scores, weight;
  std::span<std::uint16_t> rank_operand;
  std::span<std::int32_t> ids;
  CudaTape tape;  // of layers that keep none of their own

 private:
  std::unique_ptr<cuda::Arena> arena_;
};

/// A gated MLP: its matrices as operands, and of a self-routed one its thresholds.
struct CudaMlp {
  kernels::Activation phi = kernels::Activation::Silu;
  std::array<std::span<const std::uint16_t>, 3> w;  // gate, up [d_ff, d_model], down
  bool self_routed = false;
  bool up_by_input = false;
  std::array<cuda::Threshold, 3> threshold = {};  // by SelfRoutedVector
  cuda::Count* counts = nullptr;                  // inputs, routed, kept are added there
};

/// How a checkpoint's weights are taken over.
struct CudaWeights {
  bool head = true;    // of a decoder that gives divergences
  bool finite = true;  // a NaN or infinity is an error
};

/// A checkpoint's way forward on a GPU, on rows of whole windows from position 0 on: attention,
/// norms, head and dense MLPs; operands of products in bfloat16, all else in float32. Everything is
/// in device memory; work is queued on one stream and nothing waits.
class CudaDecoder {
 public:
  struct Attention {
    std::array<std::span<std::uint16_t>, kAttentionMatrices> w;  // by AttentionMatrix
    std::span<float> norm, q_norm, k_norm, post_norm;
    std::span<float> freq, back_freq;  // angles of rope(), and those turned back
    std::int64_t window = 0;
  };
  struct Layer {
    Attention attention;
    std::span<float> mlp_norm, post_mlp_norm;
    kernels::Activation phi = kernels::Activation::Silu;  // of a dense one, as these:
    std::array<std::span<std::uint16_t>, 3> dense;        // gate, up, down
  };

  /// Unpacks to the current device. All borrowed, the checkpoint for the call. Throws FormatError,
  /// DeviceError.
  CudaDecoder(const models::Checkpoint& checkpoint, const CudaWeights& weights,
              CudaScratch& scratch, cuda::Blas& blas, const cuda::Stream& stream);

  const models::ModelConfig& config() const { return config_; }
  const Layer& layer(std::size_t l) const { return layers_[l]; }
  std::span<const float> output_norm() const { return output_norm_; }
  CudaMlp dense_mlp(std::size_t l) const;
  std::int64_t q_cols() const { return std::int64_t{config_.n_heads} * config_.head_dim; }
  std::int64_t kv_cols() const { return std::int64_t{config_.n_kv_heads} * config_.head_dim; }
  cuda::WindowShape window_shape(const Layer& layer) const;

  /// x rounded, in the scratch's operand.
  cuda::Bf16Matrix operand(ConstMatrix x) const;

  /// r = the tokens' embeddings.   tokens [n] whole windows in device memory, r [n, d_model].
  /// Throws ShapeError for more rows than the scratch has.
  void embed(std::span<const std::int32_t> tokens, Matrix r) const;
  /// r += post_norm?(W_o attention(rope(norm?(W_q x)), rope(norm?(W_k x)), W_v x)), x = norm(r).
  void attention(std::size_t layer, CudaTape& tape, Matrix r) const;
  /// x = mlp_norm(r).
  void mlp_input(std::size_t layer, ConstMatrix r, Matrix x) const;
  /// y = mlp(x), or y += mlp(x).   x, y [n, d_model] without gaps, distinct
  void mlp_output(const CudaMlp& mlp, CudaTape& tape, ConstMatrix x, bool accumulate,
                  Matrix y) const;
  /// r += post_norm?(y).   y is not the scratch's x
  void add_mlp_output(std::size_t layer, ConstMatrix y, Matrix r) const;
  /// r += post_norm?(mlp(mlp_norm(r))).
  void mlp(std::size_t layer, const CudaMlp& mlp, CudaTape& tape, Matrix r) const;

  /// The final normed states of rows of r, which may have gaps.   r [n, d_model], out [n, d_model]
  void hidden(ConstMatrix r, std::uint16_t* out) const;
  /// Adds Σ KL(p_t ‖ q_t) to *kl, p_t and q_t being the distributions behind the teacher's hidden
  /// states and these; d_hidden becomes unit times its gradient in these, unless it is without
  /// rows.
  void divergence(cuda::Bf16Matrix teacher, cuda::Bf16Matrix own, double unit, Matrix d_hidden,
                  double* kl) const;

 private:
  void take_memory(const models::Checkpoint& checkpoint, const CudaWeights& weights);
  void copy_weights(const models::Checkpoint& checkpoint, const CudaWeights& weights);

  models::ModelConfig config_;
  CudaScratch& s_;
  cuda::Blas& blas_;
  const cuda::Stream& stream_;
  WeightView embedding_;  // in the file's format
  std::span<std::byte> embedding_bytes_;
  std::span<float> output_norm_;
  std::span<std::uint16_t> head_;
  std::vector<Layer> layers_;
  std::unique_ptr<cuda::Arena> arena_;
};

}  // namespace moesaic::converter
