#pragma once

#include <array>
#include <functional>
#include <string>
#include <vector>

#include "converter/recovery/attention.h"
#include "converter/recovery/low_rank_update.h"
#include "converter/recovery/rotary.h"
#include "models/transformer.h"

namespace moesaic::converter {

/// The matrices of an attention block, and their names.
enum AttentionMatrix : std::size_t { kQuery, kKey, kValue, kAttentionOutput, kAttentionMatrices };
inline constexpr std::array<const char*, kAttentionMatrices> kAttentionNames = {
    "attn_q", "attn_k", "attn_v", "attn_output"};

/// What an attention block's way back needs from its way forward.
template <class P>
struct AttentionTape {
  Storage<typename P::Scalar> qkv;         // after norms and rotation
  Storage<typename P::Scalar> qk_raw;      // before them, where heads are normed
  Storage<typename P::Scalar> mixed, lse;  // attention's output before W_o
  Storage<typename P::Scalar> out;         // W_o's, where a norm follows
};

/// r += post_norm?(W_o attention(rope(norm?(W_q x)), rope(norm?(W_k x)), W_v x)), x = norm(r), and
/// its way back. The matrices stay, or learn an update of low rank each. Norms stay.
template <class P>
class AttentionBlock {
 public:
  using Scalar = typename P::Scalar;
  using Operand = typename P::Operand;

  /// Unpacks layer `index`; `rotary` borrowed. Throws FormatError naming `name` for NaN or infinite
  /// weights.
  AttentionBlock(const models::ModelConfig& config, const models::LayerWeights& from, int index,
                 const RotaryTable<Scalar>& rotary, const std::string& name);

  /// r [n, d_model], whole windows
  void forward(Context& ctx, MatrixView<Scalar> r, AttentionTape<P>& tape) const;

  /// dr, the gradient behind the block, becomes the one before it; those of updates are added to
  /// theirs.   r_in [n, d_model]: the stream before the block
  void backward(Context& ctx, MatrixView<const Scalar> r_in, AttentionTape<P>& tape,
                MatrixView<Scalar> dr);

  /// Gives each matrix an update, zero for now.
  void learn(std::int64_t rank, std::uint64_t seed);
  /// By AttentionMatrix; empty before learn().
  std::vector<LowRankUpdate<P>>& updates() { return updates_; }
  /// Takes updates over after they changed.
  void refresh(Context& ctx);

  /// Called in forward() with the inputs of W_q, W_k and W_v, then with those of W_o, before these
  /// are read: may set() them.   x [n, d_model or n_heads · head_dim]
  using Observer = std::function<void(bool output, MatrixView<const Scalar> x)>;
  void observe(Observer observer) { observer_ = std::move(observer); }

  /// Puts values in the place of a matrix with its update.   w [rows, cols] of that matrix
  void set(Context& ctx, AttentionMatrix matrix, MatrixView<const Scalar> w);

 private:
  MatrixView<Operand> weight(std::size_t matrix) const;
  MatrixView<Scalar> heads(MatrixView<Scalar> x) const {
    return {x.data, x.rows * (x.cols / shape_.head_dim), shape_.head_dim};
  }

  AttentionShape shape_;
  Scalar eps_;
  kernels::RopeStyle rope_style_;
  const RotaryTable<Scalar>* rotary_;
  std::vector<Scalar> norm_, q_norm_, k_norm_, post_norm_;
  Storage<Operand> w_qkv_;  // [(n_heads + 2 n_kv_heads) · head_dim, d_model]
  Storage<Operand> w_o_;    // [d_model, n_heads · head_dim]
  std::vector<LowRankUpdate<P>> updates_;
  Observer observer_;
};

}  // namespace moesaic::converter
