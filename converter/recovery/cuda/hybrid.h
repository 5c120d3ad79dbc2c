#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "converter/recovery/attention_block.h"
#include "converter/recovery/cuda/memory.h"
#include "converter/recovery/hybrid.h"
#include "kernels/cuda/base/blas.h"
#include "kernels/cuda/base/stream.h"
#include "kernels/cuda/training/gated_mlp.h"
#include "kernels/cuda/training/window_attention.h"

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

/// Memory that layers use again and again, enough for so many rows of such a hybrid. Its dense
/// model shares it.
class CudaScratch {
 public:
  CudaScratch(const models::Checkpoint& hybrid, std::int64_t rows, std::int64_t n_ctx);

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

/// Tensors of a secret-MoE layer, by MoeParameters::kNames.
enum MoeTensor : std::size_t {
  kMoeGate,
  kMoeUp,
  kMoeDown,
  kMoeQ,
  kMoeP,
  kMoeBias,
  kRouterV,
  kRouterU,
  kRouterBias
};

/// A tensor under training, and as an operand of products where it is one.
struct CudaTensor {
  std::span<float> value, gradient;
  std::span<std::uint16_t> operand;
};

/// A converted layer under training.
struct CudaConverted {
  Converted<Bfloat16>* host = nullptr;  // its factors and weights of losses hold here, too
  std::vector<CudaTensor> tensors;      // by kNames of its form's parameters
  // Of self-routed layers: thresholds as given, by SelfRoutedVector; inputs, routed, kept.
  std::array<std::span<float>, 3> threshold;
  std::span<cuda::Count> counts;
  // Of secret-MoE layers: μ and ‖w_down,i‖ [n_neurons].
  std::span<float> mean, norm;
  std::span<double> auxiliary;  // [1] its router's regression loss, added up

  cuda::Threshold threshold_of(SelfRoutedVector which) const;
};

/// Hybrid<Bfloat16> on a GPU: the same contracts. All weights and activations are in device memory;
/// work is queued on one stream and nothing waits.
class CudaHybrid {
 public:
  /// Unpacks what stays of the checkpoint to the current device; what learns is taken over by
  /// put(). Without `learns` all layers must be dense. Throws InputError for a layer of another
  /// kind, FormatError for NaN or infinite weights, DeviceError. All borrowed.
  CudaHybrid(const models::Checkpoint& checkpoint, Hybrid<Bfloat16>* learns, bool recompute,
             CudaScratch& scratch, cuda::Blas& blas, const cuda::Stream& stream);

  /// The host's parameters and thresholds; parameters back, once the stream was synchronised.
  void put();
  void fetch();
  /// Takes parameters over after they changed.
  void refresh();

  /// The final normed hidden states of whole windows, [tokens, d_model], bfloat16.
  void hidden(std::span<const std::int32_t> tokens, std::uint16_t* out);

  /// Adds Σ KL from the teacher's hidden states to *kl; and, as Hybrid::gradients(), gradients and
  /// each router's loss.
  void divergence(std::span<const std::int32_t> tokens, const std::uint16_t* teacher, double* kl);
  void gradients(std::span<const std::int32_t> tokens, const std::uint16_t* teacher,
                 std::int64_t n_step, double* kl);

  void clear_gradients();

  std::vector<CudaConverted>& converted() { return converted_; }
  std::span<cuda::Count> counts() const { return counts_; }   // of all of them: 3 each
  std::span<double> auxiliary() const { return auxiliary_; }  // 1 each
  const models::ModelConfig& config() const { return config_; }

 private:
  struct Attention {
    std::array<std::span<std::uint16_t>, kAttentionMatrices> w;  // by AttentionMatrix
    std::span<float> norm, q_norm, k_norm, post_norm;
    std::span<float> freq, back_freq;  // angles of rope(), and those turned back
    std::int64_t window = 0;
  };
  struct Layer {
    Attention attention;
    std::span<float> mlp_norm, post_mlp_norm;
    kernels::Activation phi = kernels::Activation::Silu;
    std::array<std::span<std::uint16_t>, 3> dense;  // gate, up, down
    std::optional<std::size_t> converted;
  };

  void take_memory(const models::Checkpoint& checkpoint);
  void take_memory(DeviceParts& take, CudaConverted& own);
  void copy_weights(const models::Checkpoint& checkpoint);
  std::int64_t first_converted() const;
  std::int64_t q_cols() const { return std::int64_t{config_.n_heads} * config_.head_dim; }
  std::int64_t kv_cols() const { return std::int64_t{config_.n_kv_heads} * config_.head_dim; }
  CudaTape& tape(std::size_t layer);
  cuda::WindowShape window_shape(const Layer& layer) const;
  cuda::Bf16Matrix operand(ConstMatrix x);  // in the scratch's one
  cuda::Bf16Matrix matrix_of(const Layer& layer, std::size_t m) const;
  CudaConverted* moe_of(const Layer& layer);  // or null

  void embed(std::span<const std::int32_t> tokens);
  void run_layers(std::int64_t rows, bool keep);
  void attention_forward(const Layer& layer, CudaTape& tape, std::int64_t rows);
  void mlp_forward(const Layer& layer, CudaTape& tape, std::int64_t rows, bool counts);
  void mlp_backward(const Layer& layer, CudaTape& tape, std::int64_t rows, std::int64_t n_step,
                    bool need_dr);
  void gated_forward(const Layer& layer, CudaTape& tape, Matrix y, bool accumulate, bool counts);
  void gated_backward(const Layer& layer, CudaTape& tape, ConstMatrix dy, Matrix dx);
  void moe_forward(const CudaConverted& own, CudaTape& tape, Matrix y, bool accumulate);
  void moe_backward(CudaConverted& own, CudaTape& tape, ConstMatrix dy, std::int64_t n_step,
                    Matrix dx);
  void attention_backward(const Layer& layer, CudaTape& tape, ConstMatrix r_in, std::int64_t rows);
  void head(std::int64_t rows, const std::uint16_t* teacher, double unit, bool back, double* kl);

  models::ModelConfig config_;
  CudaScratch& s_;
  cuda::Blas& blas_;
  const cuda::Stream& stream_;
  bool recompute_, learns_;
  WeightView embedding_;  // in the file's format
  std::span<std::byte> embedding_bytes_;
  std::span<float> output_norm_;
  std::span<std::uint16_t> head_;  // of a model that learns
  std::vector<Layer> layers_;
  std::vector<CudaConverted> converted_;
  std::span<cuda::Count> counts_;
  std::span<double> auxiliary_;
  std::vector<CudaTape> tapes_;           // [n_layers] or none
  std::vector<std::span<float>> inputs_;  // [n_layers] the stream before each layer that learns
  std::unique_ptr<cuda::Arena> arena_;
};

}  // namespace moesaic::converter
