#include "converter/recovery/hybrid.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "converter/recovery/head.h"
#include "converter/recovery/norm.h"
#include "converter/recovery/unpack.h"
#include "kernels/base/error.h"
#include "kernels/embedding.h"

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
std::vector<T> copy(std::span<const float> values) {
  return {values.begin(), values.end()};
}

// Columns [first, first + n).
template <class T>
MatrixView<T> columns(MatrixView<T> m, std::int64_t first, std::int64_t n) {
  return {m.data + first, m.rows, n, m.stride};
}

double dense_multiply_adds(const models::ModelConfig& config) {
  return 3.0 * static_cast<double>(config.d_model) * static_cast<double>(config.d_ff);
}

template <class T>
void add(Context& ctx, MatrixView<const T> from, MatrixView<T> to) {
  for_each_row(ctx, to.rows, [&](std::int64_t t, int) {
    for (std::int64_t i = 0; i < to.cols; ++i) to.row(t)[i] += from.row(t)[i];
  });
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
  unpack_operand<P>(checkpoint.head, fmt::format("{}: output.weight", file),
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
  to.mlp_norm = copy<Scalar>(from.mlp_norm);
  to.post_mlp_norm = copy<Scalar>(from.post_mlp_norm);
  const double base = config_.layers[static_cast<std::size_t>(index)].rope_base;
  auto [table, added] = rotaries_.try_emplace(base);
  if (added) table->second = RotaryTable<Scalar>(n_ctx_, config_.head_dim, base);
  to.attention = std::make_unique<AttentionBlock<P>>(config_, from, index, table->second, name);

  if (const auto* dense = std::get_if<models::DenseMlp>(&from.mlp)) {
    to.dense.phi = dense->phi;
    unpack_operand<P>(dense->w_gate, name + ".ffn_gate",
                      to.dense.w_gate.reshape(dense->w_gate.rows, dense->w_gate.cols));
    unpack_operand<P>(dense->w_up, name + ".ffn_up",
                      to.dense.w_up.reshape(dense->w_up.rows, dense->w_up.cols));
    unpack_operand<P>(dense->w_down, name + ".ffn_down",
                      to.dense.w_down.reshape(dense->w_down.rows, dense->w_down.cols));
    return;
  }
  to.converted = converted_.size();
  if (const auto* moe = std::get_if<kernels::SecretMoeView>(&from.mlp)) {
    const MoeShape shape = shape_of(*moe);
    auto parameters = std::make_unique<MoeParameters<Scalar>>(shape);
    unpack(*moe, name + ".moe", *parameters);
    std::vector<Scalar> mean(static_cast<std::size_t>(shape.n_neurons()));
    std::copy(moe->expert_mean.begin(), moe->expert_mean.end(), mean.begin() + shape.n_shared);
    MoeLayer<P> layer(shape, *parameters, std::move(mean));
    to.active = static_cast<double>(models::multiply_adds(from.mlp)) / dense_multiply_adds(config_);
    converted_.push_back(
        {index, TrainedMoe<P>{std::move(parameters), std::make_unique<MoeParameters<Scalar>>(shape),
                              std::move(layer), RouterTraining{}, 0}});
    return;
  }
  const auto& view = std::get<kernels::SelfRoutedView>(from.mlp);
  const SelfRoutedShape shape = shape_of(view);
  auto parameters = std::make_unique<SelfRoutedParameters<Scalar>>(shape);
  unpack(view, name + ".ffn", *parameters);
  SelfRoutedLayer<P> layer(shape, *parameters, thresholds_of<Scalar>(view));
  converted_.push_back(
      {index, TrainedSelfRouted<P>{std::move(parameters),
                                   std::make_unique<SelfRoutedParameters<Scalar>>(shape),
                                   std::move(layer),
                                   {view.input_share, view.gate_share, view.hidden_share},
                                   false,
                                   {}}});
}

template <class P>
void Hybrid<P>::replace(int layer, const models::Mlp& mlp) {
  for (Converted<P>& c : converted_) {
    if (c.layer != layer) continue;
    const std::string name = fmt::format("layer {}", layer);
    if (TrainedMoe<P>* moe = c.moe()) {
      const auto* view = std::get_if<kernels::SecretMoeView>(&mlp);
      const MoeShape& own = moe->layer.shape();
      require<ShapeError>(
          view != nullptr && view->n_shared() == own.n_shared &&
              view->n_experts() == own.n_experts && view->router_rank() == own.router_rank &&
              view->bypass_rank() == own.bypass_rank && view->d_model() == own.d_model,
          "{}: parameters of another shape", name);
      unpack(*view, name, *moe->parameters);
    } else {
      const auto* view = std::get_if<kernels::SelfRoutedView>(&mlp);
      TrainedSelfRouted<P>& routed = *c.self_routed();
      const SelfRoutedShape& own = routed.layer.shape();
      require<ShapeError>(view != nullptr && view->d_model() == own.d_model &&
                              view->d_ff() == own.d_ff && view->up_by_input == own.up_by_input,
                          "{}: parameters of another shape", name);
      unpack(*view, name, *routed.parameters);
      routed.layer.set_thresholds(thresholds_of<Scalar>(*view));
    }
    c.refresh(ctx_);
  }
}

template <class P>
void Hybrid<P>::refresh() {
  for (Converted<P>& c : converted_) c.refresh(ctx_);
  for (Layer& layer : layers_) layer.attention->refresh(ctx_);
}

template <class P>
void Hybrid<P>::learn_attention(std::int64_t rank, std::uint64_t seed) {
  for (int l = first_converted() + 1; l < n_layers(); ++l) {
    AttentionBlock<P>& block = attention(l);
    block.learn(rank, seed * 1000 + static_cast<std::uint64_t>(l));
    block.refresh(ctx_);
  }
}

template <class P>
double Hybrid<P>::active_fraction() const {
  double sum = 0;
  for (const Layer& layer : layers_) {
    const auto* routed = layer.converted
                             ? std::get_if<TrainedSelfRouted<P>>(&converted_[*layer.converted].form)
                             : nullptr;
    if (routed == nullptr) {
      sum += layer.active;
    } else if (routed->seen.tokens > 0) {
      sum += routed->seen.multiply_adds(routed->layer.shape()) / dense_multiply_adds(config_);
    }
  }
  return sum / static_cast<double>(layers_.size());
}

template <class P>
void Hybrid<P>::forget_counts() {
  for (Converted<P>& c : converted_) {
    if (TrainedSelfRouted<P>* routed = c.self_routed()) routed->seen = {};
  }
}

template <class P>
void Hybrid<P>::run_layer(int index, MatrixView<Scalar> r, Tape& tape,
                          std::int64_t contribution_rows) {
  const Layer& layer = layers_[static_cast<std::size_t>(index)];
  {
    const Timed timed(times_.attention_forward);
    layer.attention->forward(ctx_, r, tape.attention);
  }
  const Timed timed(times_.mlp_forward);
  const Workspace::Scope scope(ctx_.workspace);
  std::copy_n(r.data, r.rows * r.cols, tape.r_mid.reshape(r.rows, r.cols).data);
  const MatrixView<Scalar> x = take_matrix<Scalar>(ctx_, r.rows, r.cols);
  const MatrixView<Scalar> y = tape.mlp_out.reshape(r.rows, r.cols);
  norm_forward(ctx_, constant(r), std::span<const Scalar>(layer.mlp_norm), eps_, x);
  mlp_forward(layer, constant(r), constant(x), contribution_rows, tape, y);
  if (layer.post_mlp_norm.empty()) {
    add(ctx_, constant(y), r);
    return;
  }
  norm_forward(ctx_, constant(y), std::span<const Scalar>(layer.post_mlp_norm), eps_, x);
  add(ctx_, constant(x), r);
}

// y = the MLP of x, the normed stream r.
template <class P>
void Hybrid<P>::mlp_forward(const Layer& layer, MatrixView<const Scalar> r,
                            MatrixView<const Scalar> x, std::int64_t contribution_rows, Tape& tape,
                            MatrixView<Scalar> y) {
  if (!layer.converted) {
    layer.dense.forward(ctx_, x, tape.dense, y);
    return;
  }
  const std::size_t index = *layer.converted;
  Converted<P>& c = converted_[index];
  if (const TrainedMoe<P>* moe = c.moe()) {
    moe->layer.forward(ctx_, moe->router, x, contribution_rows, tape.moe, y);
    if (feature_observer_) {
      feature_observer_(index, tape.moe.x.view(), tape.moe.f.view(), weights(r, constant(y)));
    }
    return;
  }
  TrainedSelfRouted<P>& routed = *c.self_routed();
  routed.layer.forward(ctx_, x, tape.self_routed, y);
  if (input_observer_) {
    input_observer_(index, x, weights(r, constant(y)));
    routed.layer.forward(ctx_, x, tape.self_routed, y);
  }
  routed.seen.add(tape.self_routed.counts);
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
  if (!layer.converted) {
    layer.dense.backward(ctx_, dy, tape.dense, dx);
  } else if (TrainedMoe<P>* moe = converted_[*layer.converted].moe()) {
    const std::vector<Scalar> weight = weights(r_mid, out);
    if (observer_) {
      const MatrixView<const Operand> contribution = tape.moe.contribution.view();
      observer_(*layer.converted, constant(tape.moe.x.view()).slice(0, contribution.rows),
                contribution, std::span(weight).first(static_cast<std::size_t>(contribution.rows)));
    }
    auxiliary = moe->auxiliary = moe->layer.backward(
        ctx_, moe->router, dy, weight, static_cast<double>(n_step), tape.moe, *moe->gradient, dx);
  } else {
    TrainedSelfRouted<P>& routed = *converted_[*layer.converted].self_routed();
    routed.layer.backward(ctx_, routed.straight_through, dy, tape.self_routed, *routed.gradient,
                          dx);
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
    layer.attention->backward(ctx_, input, tape(l).attention, dr);
  }
  const auto n_routers = std::count_if(converted_.begin(), converted_.end(),
                                       [](auto& c) { return c.moe() != nullptr; });
  losses.auxiliary /= static_cast<double>(std::max<std::ptrdiff_t>(1, n_routers));
  return losses;
}

template class Hybrid<Float64>;
template class Hybrid<Float32>;
template class Hybrid<Bfloat16>;

}  // namespace moesaic::converter
