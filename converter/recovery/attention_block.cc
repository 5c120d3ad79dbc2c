#include "converter/recovery/attention_block.h"

#include <algorithm>

#include "converter/recovery/norm.h"
#include "converter/recovery/unpack.h"

namespace moesaic::converter {
namespace {

template <class T>
std::vector<T> copy(std::span<const float> values) {
  return {values.begin(), values.end()};
}

}  // namespace

template <class P>
AttentionBlock<P>::AttentionBlock(const models::ModelConfig& config,
                                  const models::LayerWeights& from, int index,
                                  const RotaryTable<Scalar>& rotary, const std::string& name)
    : shape_{.n_heads = config.n_heads,
             .n_kv_heads = config.n_kv_heads,
             .head_dim = config.head_dim,
             .scale = static_cast<double>(config.attention_scale),
             .window = config.layers[static_cast<std::size_t>(index)].window,
             .n_ctx = rotary.n_ctx()},
      eps_(static_cast<Scalar>(config.norm_eps)),
      rope_style_(config.rope_style),
      rotary_(&rotary),
      norm_(copy<Scalar>(from.attn_norm)),
      q_norm_(copy<Scalar>(from.q_norm)),
      k_norm_(copy<Scalar>(from.k_norm)),
      post_norm_(copy<Scalar>(from.post_attn_norm)) {
  w_qkv_.reshape(from.w_q.rows + from.w_k.rows + from.w_v.rows, config.d_model);
  w_o_.reshape(from.w_o.rows, from.w_o.cols);
  const std::array<const WeightView*, kAttentionMatrices> all = {&from.w_q, &from.w_k, &from.w_v,
                                                                 &from.w_o};
  for (std::size_t m = 0; m < all.size(); ++m) {
    unpack_operand<P>(*all[m], name + "." + kAttentionNames[m], weight(m));
  }
}

template <class P>
MatrixView<typename P::Operand> AttentionBlock<P>::weight(std::size_t matrix) const {
  if (matrix == kAttentionOutput) return w_o_.view();
  const std::int64_t q_cols = std::int64_t{shape_.n_heads} * shape_.head_dim;
  const std::int64_t kv_cols = std::int64_t{shape_.n_kv_heads} * shape_.head_dim;
  const MatrixView<Operand> all = w_qkv_.view();
  if (matrix == kQuery) return all.slice(0, q_cols);
  return all.slice(matrix == kKey ? q_cols : q_cols + kv_cols, kv_cols);
}

template <class P>
void AttentionBlock<P>::learn(std::int64_t rank, std::uint64_t seed) {
  updates_.clear();
  for (std::size_t m = 0; m < kAttentionMatrices; ++m) {
    const MatrixView<const Operand> w = weight(m);
    AlignedBuffer<Scalar> values(static_cast<std::size_t>(w.rows * w.cols));
    for (std::int64_t r = 0; r < w.rows; ++r) {
      from_operand(w.row(r), w.cols, values.data() + r * w.cols);
    }
    updates_.emplace_back(matrix(std::as_const(values), w.rows, w.cols), rank,
                          seed * kAttentionMatrices + m);
  }
}

template <class P>
void AttentionBlock<P>::refresh(Context& ctx) {
  for (std::size_t m = 0; m < updates_.size(); ++m) {
    const Workspace::Scope scope(ctx.workspace);
    updates_[m].refresh(ctx);
    to_operand(ctx, constant(updates_[m].take_merged(ctx)), weight(m));
  }
}

template <class P>
void AttentionBlock<P>::set(Context& ctx, AttentionMatrix matrix, MatrixView<const Scalar> w) {
  to_operand(ctx, w, weight(matrix));
}

template <class P>
void AttentionBlock<P>::forward(Context& ctx, MatrixView<Scalar> r, AttentionTape<P>& tape) const {
  const Workspace::Scope scope(ctx.workspace);
  const std::int64_t m = r.rows;
  const std::int64_t d = r.cols;
  const std::int64_t q_cols = weight(kQuery).rows;
  const std::int64_t kv_cols = weight(kKey).rows;
  const MatrixView<Scalar> normed = take_matrix<Scalar>(ctx, m, d);
  const MatrixView<Operand> operand = take_matrix<Operand>(ctx, m, d);
  norm_forward(ctx, constant(r), std::span<const Scalar>(norm_), eps_, normed);
  if (observer_) observer_(false, constant(normed));
  to_operand(ctx, constant(normed), operand);
  // q, k and v one behind the other, each contiguous, so that heads are rows of their own.
  const MatrixView<Scalar> all = tape.qkv.reshape(m, q_cols + 2 * kv_cols);
  const MatrixView<Scalar> q(all.data, m, q_cols);
  const MatrixView<Scalar> k(q.data + m * q_cols, m, kv_cols);
  const MatrixView<Scalar> v(k.data + m * kv_cols, m, kv_cols);
  multiply(ctx, false, true, constant(operand), constant(weight(kQuery)), false, q);
  multiply(ctx, false, true, constant(operand), constant(weight(kKey)), false, k);
  multiply(ctx, false, true, constant(operand), constant(weight(kValue)), false, v);
  if (!q_norm_.empty()) {
    const MatrixView<Scalar> raw = tape.qk_raw.reshape(m, q_cols + kv_cols);
    std::copy_n(all.data, m * (q_cols + kv_cols), raw.data);
    norm_forward(ctx, constant(heads(q)), std::span<const Scalar>(q_norm_), eps_, heads(q));
    norm_forward(ctx, constant(heads(k)), std::span<const Scalar>(k_norm_), eps_, heads(k));
  }
  rotate(ctx, *rotary_, rope_style_, false, q);
  rotate(ctx, *rotary_, rope_style_, false, k);
  const MatrixView<Scalar> mixed = tape.mixed.reshape(m, q_cols);
  attention_forward(ctx, shape_, constant(q), constant(k), constant(v), mixed,
                    tape.lse.reshape(m, shape_.n_heads));
  if (observer_) observer_(true, constant(mixed));
  const MatrixView<Operand> mixed_operand = take_matrix<Operand>(ctx, m, q_cols);
  to_operand(ctx, constant(mixed), mixed_operand);
  if (post_norm_.empty()) {
    multiply(ctx, false, true, constant(mixed_operand), constant(w_o_.view()), true, r);
    return;
  }
  const MatrixView<Scalar> out = tape.out.reshape(m, d);
  multiply(ctx, false, true, constant(mixed_operand), constant(w_o_.view()), false, out);
  norm_forward(ctx, constant(out), std::span<const Scalar>(post_norm_), eps_, normed);
  for_each_row(ctx, m, [&](std::int64_t t, int) {
    for (std::int64_t i = 0; i < d; ++i) r.row(t)[i] += normed.row(t)[i];
  });
}

template <class P>
void AttentionBlock<P>::backward(Context& ctx, MatrixView<const Scalar> r_in,
                                 AttentionTape<P>& tape, MatrixView<Scalar> dr) {
  const Workspace::Scope scope(ctx.workspace);
  const std::int64_t m = dr.rows;
  const std::int64_t d = dr.cols;
  const std::int64_t q_cols = weight(kQuery).rows;
  const std::int64_t kv_cols = weight(kKey).rows;
  const MatrixView<Scalar> dn = take_matrix<Scalar>(ctx, m, d);
  const MatrixView<Operand> operand = take_matrix<Operand>(ctx, m, d);
  if (post_norm_.empty()) {
    to_operand(ctx, constant(dr), operand);
  } else {
    norm_backward(ctx, constant(tape.out.view()), std::span<const Scalar>(post_norm_), eps_,
                  constant(dr), false, dn);
    to_operand(ctx, constant(dn), operand);
  }
  const MatrixView<Scalar> d_mixed = take_matrix<Scalar>(ctx, m, q_cols);
  multiply(ctx, false, false, constant(operand), constant(w_o_.view()), false, d_mixed);
  if (!updates_.empty()) {
    const Workspace::Scope inner(ctx.workspace);
    const MatrixView<Operand> mixed = take_matrix<Operand>(ctx, m, q_cols);
    to_operand(ctx, constant(tape.mixed.view()), mixed);
    updates_[kAttentionOutput].backward(ctx, constant(mixed), constant(operand));
  }
  const MatrixView<const Scalar> q(tape.qkv.view().data, m, q_cols);
  const MatrixView<const Scalar> k(q.data + m * q_cols, m, kv_cols);
  const MatrixView<const Scalar> v(k.data + m * kv_cols, m, kv_cols);
  const MatrixView<Scalar> dq = take_matrix<Scalar>(ctx, m, q_cols);
  const MatrixView<Scalar> dk = take_matrix<Scalar>(ctx, m, kv_cols);
  const MatrixView<Scalar> dv = take_matrix<Scalar>(ctx, m, kv_cols);
  attention_backward(ctx, shape_, q, k, v, constant(tape.mixed.view()), constant(tape.lse.view()),
                     constant(d_mixed), dq, dk, dv);
  rotate(ctx, *rotary_, rope_style_, true, dq);
  rotate(ctx, *rotary_, rope_style_, true, dk);
  if (!q_norm_.empty()) {
    const MatrixView<Scalar> q_raw(tape.qk_raw.view().data, m, q_cols);
    const MatrixView<Scalar> k_raw(q_raw.data + m * q_cols, m, kv_cols);
    norm_backward(ctx, constant(heads(q_raw)), std::span<const Scalar>(q_norm_), eps_,
                  constant(heads(dq)), false, heads(dq));
    norm_backward(ctx, constant(heads(k_raw)), std::span<const Scalar>(k_norm_), eps_,
                  constant(heads(dk)), false, heads(dk));
  }
  if (!updates_.empty()) {
    norm_forward(ctx, r_in, std::span<const Scalar>(norm_), eps_, dn);
    to_operand(ctx, constant(dn), operand);  // x, as the way forward had it
  }
  const std::array<MatrixView<Scalar>, 3> parts = {dq, dk, dv};
  for (std::size_t p = 0; p < parts.size(); ++p) {
    const MatrixView<Operand> o = take_matrix<Operand>(ctx, m, parts[p].cols);
    to_operand(ctx, constant(parts[p]), o);
    if (!updates_.empty()) updates_[p].backward(ctx, constant(operand), constant(o));
    multiply(ctx, false, false, constant(o), constant(weight(p)), p > 0, dn);
  }
  norm_backward(ctx, r_in, std::span<const Scalar>(norm_), eps_, constant(dn), true, dr);
}

template class AttentionBlock<Float64>;
template class AttentionBlock<Float32>;
template class AttentionBlock<Bfloat16>;

}  // namespace moesaic::converter
