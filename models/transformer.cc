#include "models/transformer.h"

#include <algorithm>
#include <array>
#include <map>

#include "kernels/attention.h"
#include "kernels/base/error.h"
#include "kernels/embedding.h"
#include "kernels/linear.h"
#include "kernels/rms_norm.h"
#include "kernels/rope.h"

namespace moesaic::models {
namespace {

// A matrix in scratch memory.
Matrix take(Workspace& workspace, std::int64_t rows, std::int64_t cols) {
  return {workspace.take<float>(static_cast<std::size_t>(rows * cols)).data(), rows, cols};
}

// Moves the given rows, ascending, to the front of x.
void keep_rows(std::span<const std::int32_t> rows, Matrix x) {
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto to = static_cast<std::int64_t>(i);
    if (rows[i] != to) std::copy_n(x.row(rows[i]), x.cols, x.row(to));
  }
}

// Each head of each row as a row of its own; `x` contiguous.
Matrix heads(Matrix x, int head_dim) { return {x.data, x.rows * (x.cols / head_dim), head_dim}; }

}  // namespace

Transformer::Transformer(std::shared_ptr<const Checkpoint> checkpoint, Context& ctx)
    : checkpoint_(std::move(checkpoint)), ctx_(ctx) {
  std::map<double, std::vector<float>> tables;
  for (const ModelConfig::Layer& layer : config().layers) {
    auto [table, added] = tables.try_emplace(layer.rope_base);
    if (added) table->second = kernels::rope_frequencies(config().head_dim, layer.rope_base);
    rope_freq_.push_back(table->second);
  }
}

void Transformer::forward(const engine::Batch& batch, engine::KvCache& cache, Matrix logits) {
  const auto n_outputs = static_cast<std::int64_t>(batch.outputs.size());
  require<ShapeError>(
      logits.rows == n_outputs && (n_outputs == 0 || logits.cols == config().vocab_size),
      "logits are [{}, {}], expected [{}, {}]", logits.rows, logits.cols, n_outputs,
      config().vocab_size);
  const Workspace::Scope scope(ctx_.workspace);
  const Matrix r =
      take(ctx_.workspace, static_cast<std::int64_t>(batch.tokens.size()), config().d_model);
  run_layers(batch, cache, r);
  if (n_outputs > 0) head(r.slice(0, n_outputs), logits);
}

void Transformer::run_layers(const engine::Batch& batch, engine::KvCache& cache, Matrix r) {
  engine::check_batch(batch, shape(), cache);
  engine::HostKvCache& kv = engine::on_host(cache);
  if (batch.tokens.empty()) return;
  embed(batch.tokens, r);
  const kernels::TokenPlaces places{batch.slots, batch.positions};
  const std::size_t n_outputs = batch.outputs.size();
  const bool all_rows = observer_ || n_outputs == batch.tokens.size();
  const int last = config().n_layers - 1;
  for (int layer = 0; layer < last || (all_rows && layer == last); ++layer) {
    attention_block(layer, places, kv.layer(layer), r);
    mlp_block(layer, r);
  }
  if (all_rows) {
    keep_rows(batch.outputs, r);
    return;
  }

  const Workspace::Scope scope(ctx_.workspace);
  project_and_store(last, places, kv.layer(last), r, {});
  if (n_outputs == 0) return;
  keep_rows(batch.outputs, r);
  const std::span<std::int32_t> slots = ctx_.workspace.take<std::int32_t>(n_outputs);
  const std::span<std::int32_t> positions = ctx_.workspace.take<std::int32_t>(n_outputs);
  for (std::size_t i = 0; i < n_outputs; ++i) {
    slots[i] = batch.slots[static_cast<std::size_t>(batch.outputs[i])];
    positions[i] = batch.positions[static_cast<std::size_t>(batch.outputs[i])];
  }
  const Matrix wanted = r.slice(0, static_cast<std::int64_t>(n_outputs));
  const LayerWeights& w = checkpoint_->layers[static_cast<std::size_t>(last)];
  const Matrix q = take(ctx_.workspace, wanted.rows, w.w_q.rows);
  const kernels::LinearOutput output{w.w_q, q};
  kernels::linear_group(ctx_, attention_input(last, wanted), {&output, 1}, Traffic::Attention);
  attend(last, {slots, positions}, kv.layer(last), q, wanted);
  mlp_block(last, wanted);
}

kernels::Upcoming Transformer::first_weights(int layer) const {
  if (layer == config().n_layers) return {.weights = {checkpoint_->head}};
  const LayerWeights& w = checkpoint_->layers[static_cast<std::size_t>(layer)];
  return {.weights = {w.w_q, w.w_k, w.w_v}};
}

void Transformer::embed(std::span<const std::int32_t> tokens, Matrix r) {
  kernels::embed(ctx_, checkpoint_->embedding, tokens, config().embedding_scale, r);
}

void Transformer::attention_block(int layer, const kernels::TokenPlaces& places,
                                  kernels::KvLayerView cache, Matrix r) {
  const Workspace::Scope scope(ctx_.workspace);
  const LayerWeights& w = checkpoint_->layers[static_cast<std::size_t>(layer)];
  const Matrix q = take(ctx_.workspace, r.rows, w.w_q.rows);
  project_and_store(layer, places, cache, r, {w.w_q, q});
  attend(layer, places, cache, q, r);
}

kernels::LinearInput Transformer::attention_input(int layer, ConstMatrix r) const {
  return {r, checkpoint_->layers[static_cast<std::size_t>(layer)].attn_norm, config().norm_eps};
}

void Transformer::project_and_store(int layer, const kernels::TokenPlaces& places,
                                    kernels::KvLayerView cache, ConstMatrix r,
                                    const kernels::LinearOutput& queries) {
  const ModelConfig& c = config();
  const LayerWeights& w = checkpoint_->layers[static_cast<std::size_t>(layer)];
  const Workspace::Scope scope(ctx_.workspace);
  const Matrix k = take(ctx_.workspace, r.rows, w.w_k.rows);
  const Matrix v = take(ctx_.workspace, r.rows, w.w_v.rows);
  const std::array<kernels::LinearOutput, 3> outputs = {queries, kernels::LinearOutput{w.w_k, k},
                                                        kernels::LinearOutput{w.w_v, v}};
  kernels::read_ahead(ctx_, {.weights = {w.w_o}});
  kernels::linear_group(ctx_, attention_input(layer, r), outputs, Traffic::Attention);
  if (!w.k_norm.empty()) {
    const Matrix k_heads = heads(k, c.head_dim);
    kernels::rms_norm(ctx_, k_heads, w.k_norm, c.norm_eps, k_heads);
  }
  kernels::rope(ctx_, k, c.head_dim, places.positions, rope_freq_[static_cast<std::size_t>(layer)],
                c.rope_style);
  kernels::store_kv(ctx_, k, v, places, cache);
}

void Transformer::attend(int layer, const kernels::TokenPlaces& places, kernels::KvLayerView cache,
                         Matrix q, Matrix r) {
  const ModelConfig& c = config();
  const LayerWeights& w = checkpoint_->layers[static_cast<std::size_t>(layer)];
  const Workspace::Scope scope(ctx_.workspace);
  const Matrix mixed = take(ctx_.workspace, r.rows, w.w_q.rows);
  if (!w.q_norm.empty()) {
    const Matrix q_heads = heads(q, c.head_dim);
    kernels::rms_norm(ctx_, q_heads, w.q_norm, c.norm_eps, q_heads);
  }
  kernels::rope(ctx_, q, c.head_dim, places.positions, rope_freq_[static_cast<std::size_t>(layer)],
                c.rope_style);
  kernels::attention(ctx_, q, places, cache, c.n_heads, c.attention_scale,
                     c.layers[static_cast<std::size_t>(layer)].window, mixed);
  kernels::read_ahead(ctx_, models::first_weights(w.mlp));
  if (w.post_attn_norm.empty()) {
    kernels::linear(ctx_, w.w_o, mixed, r, Traffic::Attention, true);
  } else {
    const Matrix n = take(ctx_.workspace, r.rows, r.cols);
    kernels::linear(ctx_, w.w_o, mixed, n, Traffic::Attention);
    kernels::rms_norm(ctx_, n, w.post_attn_norm, c.norm_eps, n);
    kernels::add(ctx_, n, r);
  }
}

void Transformer::mlp_block(int layer, Matrix r) {
  const LayerWeights& w = checkpoint_->layers[static_cast<std::size_t>(layer)];
  const kernels::LinearInput input{r, w.mlp_norm, config().norm_eps};
  const std::int64_t n_active = n_selected(w.mlp);
  const Workspace::Scope scope(ctx_.workspace);
  std::span<std::int32_t> selected;
  if (observer_ && n_active > 0) {
    selected = ctx_.workspace.take<std::int32_t>(static_cast<std::size_t>(r.rows * n_active));
  }
  const Matrix y = take(ctx_.workspace, r.rows, r.cols);
  const std::int64_t work = mlp_forward(ctx_, w.mlp, input, y, selected, first_weights(layer + 1));
  ctx_.tally.add_mlp_work(work, 3 * r.rows * r.cols * config().d_ff);
  if (observer_ && n_active > 0) observer_(layer, r.rows, selected);
  add_mlp_output(layer, y, r);
}

void Transformer::mlp_input(int layer, ConstMatrix r, Matrix x) {
  kernels::rms_norm(ctx_, r, checkpoint_->layers[static_cast<std::size_t>(layer)].mlp_norm,
                    config().norm_eps, x);
}

void Transformer::add_mlp_output(int layer, Matrix y, Matrix r) {
  const std::span<const float> norm =
      checkpoint_->layers[static_cast<std::size_t>(layer)].post_mlp_norm;
  if (!norm.empty()) kernels::rms_norm(ctx_, y, norm, config().norm_eps, y);
  kernels::add(ctx_, y, r);
}

void Transformer::head(ConstMatrix r, Matrix logits) {
  const kernels::LinearOutput output{checkpoint_->head, logits};
  kernels::linear_group(ctx_, {r, checkpoint_->output_norm, config().norm_eps}, {&output, 1},
                        Traffic::Head);
}

}  // namespace moesaic::models
