#include "converter/recovery/hybrid.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "converter/recovery/head.h"
#include "converter/recovery/norm.h"
#include "kernels/base/error.h"
#include "kernels/embedding.h"
#include "kernels/quant.h"

namespace moesaic::converter {
namespace {

using Clock = std::chrono::steady_clock;

// Adds the time of its life to a count.
class Timed {
 public:
  explicit Timed(double& seconds) : seconds_(seconds), start_(Clock::now()) {}
  ~Timed() { seconds_ += std::chrono::duration<double>(Clock::now() - start_).count(); }
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  double& seconds_;
  Clock::time_point start_;
};

template <class T>
MatrixView<const T> constant(MatrixView<T> m) {
  return m;
}

template <class T>
std::vector<T> copy(std::span<const float> values) {
  return {values.begin(), values.end()};
}

// Columns [first, first + n).
template <class T>
MatrixView<T> columns(MatrixView<T> m, std::int64_t first, std::int64_t n) {
  return {m.data + first, m.rows, n, m.stride};
}

template <class T>
void add(Context& ctx, MatrixView<const T> from, MatrixView<T> to) {
  for_each_row(ctx, to.rows, [&](std::int64_t t, int) {
    for (std::int64_t i = 0; i < to.cols; ++i) to.row(t)[i] += from.row(t)[i];
  });
}

// Unpacks rows one by one and hands each over; checks that they are finite.
template <class Fn>
void for_each_weight_row(const WeightView& w, const std::string& name, Fn&& fn) {
  std::vector<float> row(static_cast<std::size_t>(w.cols));
  for (std::int64_t r = 0; r < w.rows; ++r) {
    kernels::dequantize_row(w.dtype, w.row(r), row);
    require<FormatError>(
        std::all_of(row.begin(), row.end(), [](float v) { return std::isfinite(v); }),
        "{}: row {} holds a NaN or infinity, expected finite weights", name, r);
    fn(r, row);
  }
}

template <class P>
void unpack(const WeightView& w, const std::string& name, MatrixView<typename P::Operand> to) {
  std::vector<typename P::Scalar> values(static_cast<std::size_t>(w.cols));
  for_each_weight_row(w, name, [&](std::int64_t r, const std::vector<float>& row) {
    std::copy(row.begin(), row.end(), values.begin());
    to_operand(values.data(), w.cols, to.row(r));
  });
}

template <class T>
void unpack_parameters(const WeightView& w, const std::string& name, AlignedBuffer<T>& to) {
  for_each_weight_row(w, name, [&](std::int64_t r, const std::vector<float>& row) {
    std::copy(row.begin(), row.end(), to.begin() + r * w.cols);
  });
}

// Gate, up and down rows interleaved, as neurons `first` and on.
template <class T>
void unpack_neurons(const WeightView& w, const std::string& name, std::int64_t first,
                    MoeParameters<T>& to) {
  for_each_weight_row(w, name, [&](std::int64_t r, const std::vector<float>& row) {
    AlignedBuffer<T>* parts[3] = {&to.w_gate, &to.w_up, &to.w_down};
    std::copy(row.begin(), row.end(), parts[r % 3]->begin() + (first + r / 3) * w.cols);
  });
}

MoeShape shape_of(const kernels::SecretMoeView& view) {
  return {.phi = view.phi,
          .d_model = view.d_model(),
          .n_shared = view.n_shared(),
          .n_experts = view.n_experts(),
          .n_active = view.n_active,
          .router_rank = view.router_rank(),
          .bypass_rank = view.bypass_rank()};
}

template <class T>
void unpack_moe(const kernels::SecretMoeView& view, const std::string& name, MoeParameters<T>& to) {
  unpack_neurons(view.shared, name + ".shared", 0, to);
  unpack_neurons(view.experts, name + ".experts", view.n_shared(), to);
  unpack_parameters(view.router_v, name + ".router_v", to.router_v);
  unpack_parameters(view.router_u, name + ".router_u", to.router_u);
  unpack_parameters(view.bypass_q, name + ".bypass_q", to.bypass_q);
  unpack_parameters(view.bypass_p, name + ".bypass_p", to.bypass_p);
  std::copy(view.router_bias.begin(), view.router_bias.end(), to.router_bias.begin());
  std::copy(view.bias.begin(), view.bias.end(), to.bias.begin());
}

}  // namespace

template <class P>
Hybrid<P>::Hybrid(const models::Checkpoint& checkpoint, Context& ctx, std::int64_t n_ctx,
                  bool recompute)
    : config_(checkpoint.config),
      ctx_(ctx),
      n_ctx_(n_ctx),
      recompute_(recompute),
      eps_(static_cast<Scalar>(checkpoint.config.norm_eps)),
      file_(checkpoint.file),
      embedding_(checkpoint.embedding),
      output_norm_(copy<Scalar>(checkpoint.output_norm)),
      layers_(checkpoint.layers.size()),
      tapes_(recompute ? 1 : checkpoint.layers.size()),
      inputs_(checkpoint.layers.size()) {
  const std::string file = checkpoint.file->path().filename().string();
  unpack<P>(checkpoint.head, fmt::format("{}: output.weight", file),
            head_.reshape(checkpoint.head.rows, checkpoint.head.cols));
  for (int l = 0; l < n_layers(); ++l) load_layer(checkpoint, l);
  refresh();
}

template <class P>
void Hybrid<P>::load_layer(const models::Checkpoint& checkpoint, int index) {
  const models::LayerWeights& from = checkpoint.layers[static_cast<std::size_t>(index)];
  Layer& to = layers_[static_cast<std::size_t>(index)];
  const std::string name =
      fmt::format("{}: blk.{}", checkpoint.file->path().filename().string(), index);
  to.attn_norm = copy<Scalar>(from.attn_norm);
  to.q_norm = copy<Scalar>(from.q_norm);
  to.k_norm = copy<Scalar>(from.k_norm);
  to.post_attn_norm = copy<Scalar>(from.post_attn_norm);
  to.mlp_norm = copy<Scalar>(from.mlp_norm);
  to.post_mlp_norm = copy<Scalar>(from.post_mlp_norm);
  const MatrixView<Operand> qkv =
      to.w_qkv.reshape(from.w_q.rows + from.w_k.rows + from.w_v.rows, config_.d_model);
  std::int64_t row = 0;
  for (const WeightView* w : {&from.w_q, &from.w_k, &from.w_v}) {
    unpack<P>(*w, name + ".attention", qkv.slice(row, w->rows));
    row += w->rows;
  }
  unpack<P>(from.w_o, name + ".attn_output", to.w_o.reshape(from.w_o.rows, from.w_o.cols));

  const models::ModelConfig::Layer& own = config_.layers[static_cast<std::size_t>(index)];
  to.attention = {.n_heads = config_.n_heads,
                  .n_kv_heads = config_.n_kv_heads,
                  .head_dim = config_.head_dim,
                  .scale = static_cast<double>(config_.attention_scale),
                  .window = own.window,
                  .n_ctx = n_ctx_};
  auto [table, added] = rotaries_.try_emplace(own.rope_base);
  if (added) table->second = RotaryTable<Scalar>(n_ctx_, config_.head_dim, own.rope_base);
  to.rotary = &table->second;

  if (const auto* dense = std::get_if<models::DenseMlp>(&from.mlp)) {
    to.dense.phi = dense->phi;
    unpack<P>(dense->w_gate, name + ".ffn_gate",
              to.dense.w_gate.reshape(dense->w_gate.rows, dense->w_gate.cols));
    unpack<P>(dense->w_up, name + ".ffn_up",
              to.dense.w_up.reshape(dense->w_up.rows, dense->w_up.cols));
    unpack<P>(dense->w_down, name + ".ffn_down",
              to.dense.w_down.reshape(dense->w_down.rows, dense->w_down.cols));
    return;
  }
  const auto& view = std::get<kernels::SecretMoeView>(from.mlp);
  const MoeShape shape = shape_of(view);
  auto parameters = std::make_unique<MoeParameters<Scalar>>(shape);
  unpack_moe(view, name + ".moe", *parameters);
  std::vector<Scalar> mean(static_cast<std::size_t>(shape.n_neurons()));
  std::copy(view.expert_mean.begin(), view.expert_mean.end(), mean.begin() + shape.n_shared);
  auto gradient = std::make_unique<MoeParameters<Scalar>>(shape);
  to.converted = converted_.size();
  converted_.push_back({index, MoeLayer<P>(shape, *parameters, std::move(mean)), RouterTraining{},
                        *parameters, *gradient});
  parameters_.push_back(std::move(parameters));
  gradients_.push_back(std::move(gradient));
}

template <class P>
void Hybrid<P>::replace(int layer, const kernels::SecretMoeView& view) {
  for (Converted& c : converted_) {
    if (c.layer != layer) continue;
    const MoeShape& own = c.moe.shape();
    require<ShapeError>(view.n_shared() == own.n_shared && view.n_experts() == own.n_experts &&
                            view.router_rank() == own.router_rank &&
                            view.bypass_rank() == own.bypass_rank && view.d_model() == own.d_model,
                        "layer {}: parameters of another shape", layer);
    unpack_moe(view, fmt::format("layer {}", layer), c.parameters);
    c.moe.refresh(ctx_);
  }
}

template <class P>
void Hybrid<P>::refresh() {
  for (Converted& c : converted_) c.moe.refresh(ctx_);
}

template <class P>
MatrixView<typename P::Scalar> Hybrid<P>::heads(MatrixView<Scalar> x) const {
  return {x.data, x.rows * (x.cols / config_.head_dim), config_.head_dim};
}

// r += post_norm?(W_o attention(rope(norm?(q)), …)).
template <class P>
void Hybrid<P>::attention_block(const Layer& layer, MatrixView<Scalar> r, Tape& tape) {
  const Workspace::Scope scope(ctx_.workspace);
  const std::int64_t m = r.rows;
  const std::int64_t d = r.cols;
  const std::int64_t q_cols = std::int64_t{config_.n_heads} * config_.head_dim;
  const std::int64_t kv_cols = std::int64_t{config_.n_kv_heads} * config_.head_dim;
  const MatrixView<Scalar> normed = take_matrix<Scalar>(ctx_, m, d);
  const MatrixView<Operand> operand = take_matrix<Operand>(ctx_, m, d);
  norm_forward(ctx_, constant(r), std::span<const Scalar>(layer.attn_norm), eps_, normed);
  to_operand(ctx_, constant(normed), operand);
  // q, k and v one behind the other, each contiguous, so that heads are rows of their own.
  const MatrixView<Scalar> all = tape.qkv.reshape(m, q_cols + 2 * kv_cols);
  const MatrixView<Scalar> q(all.data, m, q_cols);
  const MatrixView<Scalar> k(q.data + m * q_cols, m, kv_cols);
  const MatrixView<Scalar> v(k.data + m * kv_cols, m, kv_cols);
  const MatrixView<const Operand> w = layer.w_qkv.view();
  multiply(ctx_, false, true, constant(operand), w.slice(0, q_cols), false, q);
  multiply(ctx_, false, true, constant(operand), w.slice(q_cols, kv_cols), false, k);
  multiply(ctx_, false, true, constant(operand), w.slice(q_cols + kv_cols, kv_cols), false, v);
  if (!layer.q_norm.empty()) {
    const MatrixView<Scalar> raw = tape.qk_raw.reshape(m, q_cols + kv_cols);
    std::copy_n(all.data, m * (q_cols + kv_cols), raw.data);
    norm_forward(ctx_, constant(heads(q)), std::span<const Scalar>(layer.q_norm), eps_, heads(q));
    norm_forward(ctx_, constant(heads(k)), std::span<const Scalar>(layer.k_norm), eps_, heads(k));
  }
  rotate(ctx_, *layer.rotary, config_.rope_style, false, q);
  rotate(ctx_, *layer.rotary, config_.rope_style, false, k);
  const MatrixView<Scalar> mixed = tape.mixed.reshape(m, q_cols);
  attention_forward(ctx_, layer.attention, constant(q), constant(k), constant(v), mixed,
                    tape.lse.reshape(m, config_.n_heads));
  const MatrixView<Operand> mixed_operand = take_matrix<Operand>(ctx_, m, q_cols);
  to_operand(ctx_, constant(mixed), mixed_operand);
  if (layer.post_attn_norm.empty()) {
    multiply(ctx_, false, true, constant(mixed_operand), constant(layer.w_o.view()), true, r);
    return;
  }
  const MatrixView<Scalar> out = tape.attn_out.reshape(m, d);
  multiply(ctx_, false, true, constant(mixed_operand), constant(layer.w_o.view()), false, out);
  norm_forward(ctx_, constant(out), std::span<const Scalar>(layer.post_attn_norm), eps_, normed);
  add(ctx_, constant(normed), r);
}

// dr, the gradient behind the block, becomes the one before it.
template <class P>
void Hybrid<P>::attention_backward_block(const Layer& layer, MatrixView<const Scalar> r_in,
                                         Tape& tape, MatrixView<Scalar> dr) {
  const Workspace::Scope scope(ctx_.workspace);
  const std::int64_t m = dr.rows;
  const std::int64_t d = dr.cols;
  const std::int64_t q_cols = std::int64_t{config_.n_heads} * config_.head_dim;
  const std::int64_t kv_cols = std::int64_t{config_.n_kv_heads} * config_.head_dim;
  const MatrixView<Scalar> dn = take_matrix<Scalar>(ctx_, m, d);
  const MatrixView<Operand> operand = take_matrix<Operand>(ctx_, m, d);
  if (layer.post_attn_norm.empty()) {
    to_operand(ctx_, constant(dr), operand);
  } else {
    norm_backward(ctx_, constant(tape.attn_out.view()),
                  std::span<const Scalar>(layer.post_attn_norm), eps_, constant(dr), false, dn);
    to_operand(ctx_, constant(dn), operand);
  }
  const MatrixView<Scalar> d_mixed = take_matrix<Scalar>(ctx_, m, q_cols);
  multiply(ctx_, false, false, constant(operand), constant(layer.w_o.view()), false, d_mixed);
  const MatrixView<const Scalar> q(tape.qkv.view().data, m, q_cols);
  const MatrixView<const Scalar> k(q.data + m * q_cols, m, kv_cols);
  const MatrixView<const Scalar> v(k.data + m * kv_cols, m, kv_cols);
  const MatrixView<Scalar> dq = take_matrix<Scalar>(ctx_, m, q_cols);
  const MatrixView<Scalar> dk = take_matrix<Scalar>(ctx_, m, kv_cols);
  const MatrixView<Scalar> dv = take_matrix<Scalar>(ctx_, m, kv_cols);
  attention_backward(ctx_, layer.attention, q, k, v, constant(tape.mixed.view()),
                     constant(tape.lse.view()), constant(d_mixed), dq, dk, dv);
  rotate(ctx_, *layer.rotary, config_.rope_style, true, dq);
  rotate(ctx_, *layer.rotary, config_.rope_style, true, dk);
  if (!layer.q_norm.empty()) {
    const MatrixView<Scalar> q_raw(tape.qk_raw.view().data, m, q_cols);
    const MatrixView<Scalar> k_raw(q_raw.data + m * q_cols, m, kv_cols);
    norm_backward(ctx_, constant(heads(q_raw)), std::span<const Scalar>(layer.q_norm), eps_,
                  constant(heads(dq)), false, heads(dq));
    norm_backward(ctx_, constant(heads(k_raw)), std::span<const Scalar>(layer.k_norm), eps_,
                  constant(heads(dk)), false, heads(dk));
  }
  const MatrixView<const Operand> w = layer.w_qkv.view();
  std::int64_t first = 0;
  for (const MatrixView<Scalar>& part : {dq, dk, dv}) {
    const MatrixView<Operand> o = take_matrix<Operand>(ctx_, m, part.cols);
    to_operand(ctx_, constant(part), o);
    multiply(ctx_, false, false, constant(o), w.slice(first, part.cols), first > 0, dn);
    first += part.cols;
  }
  norm_backward(ctx_, r_in, std::span<const Scalar>(layer.attn_norm), eps_, constant(dn), true, dr);
}

template <class P>
void Hybrid<P>::run_layer(int index, MatrixView<Scalar> r, Tape& tape,
                          std::int64_t contribution_rows) {
  const Layer& layer = layers_[static_cast<std::size_t>(index)];
  {
    const Timed timed(times_.attention_forward);
    attention_block(layer, r, tape);
  }
  const Timed timed(times_.mlp_forward);
  const Workspace::Scope scope(ctx_.workspace);
  std::copy_n(r.data, r.rows * r.cols, tape.r_mid.reshape(r.rows, r.cols).data);
  const MatrixView<Scalar> x = take_matrix<Scalar>(ctx_, r.rows, r.cols);
  const MatrixView<Scalar> y = tape.mlp_out.reshape(r.rows, r.cols);
  norm_forward(ctx_, constant(r), std::span<const Scalar>(layer.mlp_norm), eps_, x);
  if (layer.converted) {
    const Converted& c = converted_[*layer.converted];
    c.moe.forward(ctx_, c.router, x, contribution_rows, tape.moe, y);
    if (feature_observer_) {
      const std::vector<Scalar> weight = weights(constant(r), constant(y));
      feature_observer_(*layer.converted, tape.moe.x.view(), tape.moe.f.view(), weight);
    }
  } else {
    layer.dense.forward(ctx_, x, tape.dense, y);
  }
  if (layer.post_mlp_norm.empty()) {
    add(ctx_, constant(y), r);
    return;
  }
  norm_forward(ctx_, constant(y), std::span<const Scalar>(layer.post_mlp_norm), eps_, x);
  add(ctx_, constant(x), r);
}

template <class P>
std::vector<typename P::Scalar> Hybrid<P>::weights(MatrixView<const Scalar> r,
                                                   MatrixView<const Scalar> y) const {
  std::vector<Scalar> weight(static_cast<std::size_t>(r.rows));
  const auto square = [](const Scalar* row, std::int64_t n) {
    return std::inner_product(row, row + n, row, Scalar(0));
  };
  Scalar total = 0;
  for (std::int64_t t = 0; t < r.rows; ++t) {
    Scalar w = 1 / (square(r.row(t), r.cols) + Scalar(1e-20));
    if (config_.post_norms) {
      w *= static_cast<Scalar>(y.cols) / (square(y.row(t), y.cols) + Scalar(1e-20));
    }
    weight[static_cast<std::size_t>(t)] = w;
    total += w;
  }
  for (Scalar& w : weight) w *= static_cast<Scalar>(r.rows) / total;
  return weight;
}

template <class P>
double Hybrid<P>::mlp_backward_block(Layer& layer, std::int64_t n_step, Tape& tape, bool need_dr,
                                     MatrixView<Scalar> dr) {
  const Workspace::Scope scope(ctx_.workspace);
  const std::int64_t m = dr.rows;
  const MatrixView<const Scalar> r_mid = tape.r_mid.view();
  const MatrixView<const Scalar> out = tape.mlp_out.view();
  MatrixView<const Scalar> dy = dr;
  if (!layer.post_mlp_norm.empty()) {
    const MatrixView<Scalar> normed = take_matrix<Scalar>(ctx_, m, dr.cols);
    norm_backward(ctx_, out, std::span<const Scalar>(layer.post_mlp_norm), eps_, constant(dr),
                  false, normed);
    dy = normed;
  }
  MatrixView<Scalar> dx;
  if (need_dr) dx = take_matrix<Scalar>(ctx_, m, dr.cols);
  double auxiliary = 0;
  if (layer.converted) {
    Converted& c = converted_[*layer.converted];
    const std::vector<Scalar> weight = weights(r_mid, out);
    if (observer_) {
      const MatrixView<const Operand> contribution = tape.moe.contribution.view();
      observer_(*layer.converted, constant(tape.moe.x.view()).slice(0, contribution.rows),
                contribution, std::span(weight).first(static_cast<std::size_t>(contribution.rows)));
    }
    auxiliary = c.auxiliary = c.moe.backward(ctx_, c.router, dy, weight,
                                             static_cast<double>(n_step), tape.moe, c.gradient, dx);
  } else {
    layer.dense.backward(ctx_, dy, tape.dense, dx);
  }
  if (need_dr) {
    norm_backward(ctx_, r_mid, std::span<const Scalar>(layer.mlp_norm), eps_, constant(dx), true,
                  dr);
  }
  return auxiliary;
}

// Embeds and runs all layers; `keep`: the stream before each layer from the first converted one on,
// and the tapes, for the way back.
template <class P>
void Hybrid<P>::run_layers(std::span<const std::int32_t> tokens, MatrixView<Scalar> r, bool keep) {
  {
    const Workspace::Scope scope(ctx_.workspace);
    const Matrix embedded = take_matrix<float>(ctx_, r.rows, r.cols);
    kernels::embed(ctx_, embedding_, tokens, config_.embedding_scale, embedded);
    std::copy_n(embedded.data, r.rows * r.cols, r.data);
  }
  for (int l = 0; l < n_layers(); ++l) {
    const bool kept = keep && l >= first_converted();
    if (kept) {
      std::copy_n(r.data, r.rows * r.cols,
                  inputs_[static_cast<std::size_t>(l)].reshape(r.rows, r.cols).data);
    }
    run_layer(l, r, kept ? tape(l) : tapes_.back(), kept ? contribution_rows_ : 0);
  }
}

template <class P>
void Hybrid<P>::forward(std::span<const std::int32_t> tokens, MatrixView<Operand> h) {
  const Workspace::Scope scope(ctx_.workspace);
  const MatrixView<Scalar> r =
      take_matrix<Scalar>(ctx_, static_cast<std::int64_t>(tokens.size()), config_.d_model);
  run_layers(tokens, r, false);
  norm_forward(ctx_, constant(r), std::span<const Scalar>(output_norm_), eps_, r);
  to_operand(ctx_, constant(r), h);
}

template <class P>
double Hybrid<P>::divergence(std::span<const std::int32_t> tokens,
                             MatrixView<const Operand> teacher) {
  const Workspace::Scope scope(ctx_.workspace);
  const MatrixView<Operand> h = take_matrix<Operand>(ctx_, teacher.rows, teacher.cols);
  forward(tokens, h);
  return kl_head<P>(ctx_, head_.view(), teacher, h, 1, {});
}

template <class P>
typename Hybrid<P>::Losses Hybrid<P>::gradients(std::span<const std::int32_t> tokens,
                                                MatrixView<const Operand> teacher,
                                                std::int64_t n_step) {
  const Workspace::Scope scope(ctx_.workspace);
  const auto m = static_cast<std::int64_t>(tokens.size());
  const MatrixView<Scalar> r = take_matrix<Scalar>(ctx_, m, config_.d_model);
  const MatrixView<Scalar> dr = take_matrix<Scalar>(ctx_, m, config_.d_model);
  run_layers(tokens, r, true);
  Losses losses;
  {
    const Timed timed(times_.head);
    const Workspace::Scope head_scope(ctx_.workspace);
    const MatrixView<Operand> h = take_matrix<Operand>(ctx_, m, config_.d_model);
    norm_forward(ctx_, constant(r), std::span<const Scalar>(output_norm_), eps_, dr);
    to_operand(ctx_, constant(dr), h);
    losses.kl =
        kl_head<P>(ctx_, head_.view(), teacher, constant(h), 1 / static_cast<double>(n_step), dr);
    norm_backward(ctx_, constant(r), std::span<const Scalar>(output_norm_), eps_, constant(dr),
                  false, dr);
  }
  const int first = first_converted();
  for (int l = n_layers() - 1; l >= first; --l) {
    Layer& layer = layers_[static_cast<std::size_t>(l)];
    const MatrixView<const Scalar> input = inputs_[static_cast<std::size_t>(l)].view();
    if (recompute_) {
      std::copy_n(input.data, m * config_.d_model, r.data);
      run_layer(l, r, tape(l), contribution_rows_);
    }
    // Nothing below the first converted layer's MLP wants a gradient.
    const bool need_dr = l > first;
    {
      const Timed timed(times_.mlp_backward);
      losses.auxiliary += mlp_backward_block(layer, n_step, tape(l), need_dr, dr);
    }
    if (!need_dr) break;
    const Timed timed(times_.attention_backward);
    attention_backward_block(layer, input, tape(l), dr);
  }
  losses.auxiliary /= static_cast<double>(std::max<std::size_t>(1, converted_.size()));
  return losses;
}

template class Hybrid<Float64>;
template class Hybrid<Float32>;
template class Hybrid<Bfloat16>;

}  // namespace moesaic::converter
