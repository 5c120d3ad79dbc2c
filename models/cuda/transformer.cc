#include "models/cuda/transformer.h"

#include <algorithm>
#include <array>
#include <bit>
#include <variant>

#include "kernels/base/error.h"
#include "kernels/cuda/activation.h"
#include "kernels/cuda/base/device.h"
#include "kernels/cuda/embedding.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/mixture.h"
#include "kernels/cuda/prompt_attention.h"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/rope.h"
#include "kernels/cuda/secret_moe.h"
#include "kernels/cuda/self_routed.h"

namespace moesaic::models {
namespace {

constexpr std::int64_t kMinPositions = 256;  // a graph serves at least so many, then powers of two
constexpr std::int64_t kAttentionRows = 32;  // of a launch of split KV: bounds its workspace
// Larger batches are prompts: launched too seldom for graphs, and with rows enough for bfloat16
// copies of the weights. A pass over 4-bit weights moves 0.6 bytes a weight for each 8 rows, a copy
// 4.6 once: as much as about 60 rows.
constexpr std::int64_t kGraphRows = 64;
constexpr std::size_t kMaxGraphs = 64;

// Makes the device current before anything is allocated on it.
std::shared_ptr<const Checkpoint> on_device(std::shared_ptr<const Checkpoint> checkpoint,
                                            int device) {
  const ModelConfig& c = checkpoint->config;
  for (const std::int64_t cols : {c.d_model, c.d_ff, std::int64_t{c.head_dim}}) {
    require<ShapeError>(cols % 4 == 0, "cuda: rows of {} elements, expected a multiple of 4", cols);
  }
  cuda::use_device(device);
  return checkpoint;
}

Matrix matrix(std::span<float> data, std::int64_t rows, std::int64_t cols) {
  return {data.data(), rows, cols};
}

std::int64_t heads(const ModelConfig& c) { return std::int64_t{c.n_heads} * c.head_dim; }
std::int64_t kv_heads(const ModelConfig& c) { return std::int64_t{c.n_kv_heads} * c.head_dim; }

// Of queue_products().
std::size_t products_workspace(const CudaWeights& weights, std::int64_t n_rows,
                               std::int64_t n_outputs) {
  std::int64_t cols = 1, elements = 0;
  const auto add = [&](const WeightView& w) {
    cols = std::max(cols, w.cols);
    elements = std::max(elements, w.rows * w.cols);
  };
  for (const LayerWeights& layer : weights.layers) {
    for (const WeightView* w : {&layer.w_q, &layer.w_k, &layer.w_v, &layer.w_o}) add(*w);
    if (const auto* dense = std::get_if<DenseMlp>(&layer.mlp)) {
      for (const WeightView* w : {&dense->w_gate, &dense->w_up, &dense->w_down}) add(*w);
    }
  }
  if (n_outputs > kGraphRows) add(weights.head);
  return cuda::gemm_workspace(n_rows, cols, elements);
}

// The norm of each head of each row of x, where the model has one.
void norm_heads(Matrix x, std::span<const float> weight, const ModelConfig& c,
                cuda::StreamHandle stream) {
  if (weight.empty()) return;
  const Matrix each(x.data, x.rows * (x.cols / c.head_dim), c.head_dim);
  cuda::rms_norm(each, weight.data(), c.norm_eps, each, stream);
}

}  // namespace

CudaTransformer::Buffers::Buffers(const ModelConfig& c, const CudaWeights& weights,
                                  std::int64_t rows_wanted, std::int64_t outputs_wanted,
                                  std::int64_t positions_wanted, const cuda::Stream& stream)
    : n_rows(rows_wanted), n_outputs(outputs_wanted), max_positions(positions_wanted) {
  std::size_t moe_bytes = 0, moe_batch_bytes = 0, self_routed_bytes = 0, mixture_bytes = 0;
  // Of dense products, and of batches of self-routed layers: neither leaves anything in it.
  std::size_t gemm_bytes = n_rows > kGraphRows ? products_workspace(weights, n_rows, n_outputs) : 0;
  std::int64_t n_selected = 0;
  for (const LayerWeights& layer : weights.layers) {
    if (const auto* moe = std::get_if<kernels::SecretMoeView>(&layer.mlp)) {
      moe_bytes = std::max(moe_bytes, cuda::secret_moe_token_workspace(*moe));
      if (n_rows > kGraphRows) {
        moe_batch_bytes = std::max(moe_batch_bytes, cuda::secret_moe_batch_workspace(*moe, n_rows));
      }
      n_selected = std::max(n_selected, moe->n_active);
    } else if (const auto* self = std::get_if<kernels::SelfRoutedView>(&layer.mlp)) {
      self_routed_bytes = std::max(self_routed_bytes, cuda::self_routed_workspace(*self));
      if (n_rows > kGraphRows) {
        gemm_bytes = std::max(gemm_bytes, cuda::self_routed_batch_workspace(*self, n_rows));
      }
    } else if (const auto* general = std::get_if<kernels::MixtureView>(&layer.mlp)) {
      mixture_bytes = std::max(mixture_bytes, cuda::mixture_workspace(*general));
    }
  }
  const cuda::AttentionShape shape{c.n_heads, 0, 0, max_positions};
  const std::size_t attention_bytes =
      cuda::attention_workspace(shape, std::min(n_rows, kAttentionRows), c.head_dim);

  // Twice the same walk: for the size, then for the memory.
  std::size_t bytes = 0;
  const auto divide = [&] {
    const auto take = [&]<class T>(std::span<T>& part, std::int64_t n, std::int64_t cols) {
      const auto count = static_cast<std::size_t>(n * cols);
      bytes += cuda::Arena::bytes_for<T>(count);
      if (arena != nullptr) part = arena->take<T>(count);
    };
    for (auto* part : {&r, &this->n, &t, &wanted}) take(*part, n_rows, c.d_model);
    for (auto* part : {&q, &mixed}) take(*part, n_rows, heads(c));
    for (auto* part : {&k, &v}) take(*part, n_rows, kv_heads(c));
    for (auto* part : {&gate, &up}) take(*part, n_rows, c.d_ff);
    take(logits, n_outputs, c.vocab_size);
    take(rows, 3, n_rows);
    take(selected, n_rows > kGraphRows ? n_rows : 1, n_selected);
    take(draws, n_outputs, 1);
    take(ids, n_outputs, 1);
    take(sample, 1, static_cast<std::int64_t>(cuda::sample_workspace(n_outputs)));
    take(attention, 1, static_cast<std::int64_t>(attention_bytes));
    take(gemm, 1, static_cast<std::int64_t>(gemm_bytes));
    take(mixture, 1, static_cast<std::int64_t>(mixture_bytes));
    // Apart: each begins with counters that only its own kind of layer and path leaves fit for use.
    take(moe, 1, static_cast<std::int64_t>(moe_bytes));
    take(moe_batch, 1, static_cast<std::int64_t>(moe_batch_bytes));
    take(self_routed, 1, static_cast<std::int64_t>(self_routed_bytes));
  };
  divide();
  arena = std::make_shared<cuda::Arena>(bytes);
  divide();
  for (const auto part : {sample, moe, moe_batch, self_routed}) {
    cuda::zero_bytes(part.data(), part.size(), stream);
  }
  host_rows = cuda::PinnedBuffer<std::int32_t>(rows.size());
  host_logits = cuda::PinnedBuffer<float>(logits.size());
  host_draws = cuda::PinnedBuffer<kernels::Draw>(draws.size());
  host_ids = cuda::PinnedBuffer<std::int32_t>(ids.size());
}

CudaTransformer::CudaTransformer(std::shared_ptr<const Checkpoint> checkpoint, int device)
    : checkpoint_(on_device(std::move(checkpoint), device)), weights_(*checkpoint_, stream_) {}

std::unique_ptr<engine::KvCache> CudaTransformer::make_cache(std::int64_t n_slots,
                                                             std::int64_t capacity) const {
  return std::make_unique<CudaKvCache>(shape(), n_slots, capacity);
}

void CudaTransformer::reserve(const PassShape& pass) {
  Buffers& b = buffers_;
  if (pass.n_rows > kGraphRows && !blas_) blas_.emplace(stream_);
  if (pass.n_rows <= b.n_rows && pass.n_outputs <= b.n_outputs &&
      pass.max_positions <= b.max_positions) {
    return;
  }
  graphs_.clear();  // they hold the old addresses
  const std::int64_t rows = std::max(pass.n_rows, b.n_rows);
  const std::int64_t outputs = std::max(pass.n_outputs, b.n_outputs);
  const std::int64_t positions = std::max(pass.max_positions, b.max_positions);
  b = Buffers();  // before the new ones are allocated
  b = Buffers(config(), weights_, rows, outputs, positions, stream_);
}

void CudaTransformer::forward(const engine::Batch& batch, engine::KvCache& cache, Matrix logits) {
  const auto n_outputs = static_cast<std::int64_t>(batch.outputs.size());
  require<ShapeError>(
      logits.rows == n_outputs && (n_outputs == 0 || logits.cols == config().vocab_size),
      "logits are [{}, {}], expected [{}, {}]", logits.rows, logits.cols, n_outputs,
      config().vocab_size);
  run(batch, cache, {});
  const float* from = buffers_.host_logits.span().data();
  for (std::int64_t row = 0; row < n_outputs; ++row) {
    std::copy_n(from + row * config().vocab_size, config().vocab_size, logits.row(row));
  }
}

void CudaTransformer::forward_and_draw(const engine::Batch& batch, engine::KvCache& cache,
                                       std::span<const kernels::Draw> draws,
                                       std::span<std::int32_t> ids) {
  const std::size_t n_outputs = batch.outputs.size();
  require<ShapeError>(draws.size() == n_outputs && ids.size() == n_outputs,
                      "{} draws for {} ids, expected {}, one for each output", draws.size(),
                      ids.size(), n_outputs);
  run(batch, cache, draws);
  std::copy_n(buffers_.host_ids.span().data(), n_outputs, ids.data());
}

void CudaTransformer::run(const engine::Batch& batch, engine::KvCache& cache,
                          std::span<const kernels::Draw> draws) {
  const auto n_rows = static_cast<std::int64_t>(batch.tokens.size());
  const auto n_outputs = static_cast<std::int64_t>(batch.outputs.size());
  engine::check_batch(batch, shape(), cache);
  auto* paged = dynamic_cast<CudaKvCache*>(&cache);
  require<ShapeError>(paged != nullptr,
                      "KV cache in the host's memory, expected one of make_cache()");
  for (std::size_t t = 0; t < batch.tokens.size(); ++t) {
    require<InputError>(batch.tokens[t] >= 0 && batch.tokens[t] < config().vocab_size,
                        "embed: id {} of row {}, expected 0 to {}", batch.tokens[t], t,
                        config().vocab_size - 1);
  }
  if (n_rows == 0) return;

  const std::int64_t last = std::ranges::max(batch.positions) + std::int64_t{1};
  const auto bucket = static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(last)));
  const PassShape pass{n_rows,
                       n_outputs,
                       std::min(std::max(bucket, kMinPositions), cache.capacity()),
                       paged->layer(0).pages,
                       paged->layer(0).pages_per_slot,
                       !draws.empty()};
  reserve(pass);
  paged->reach(batch, stream_);
  std::int32_t* to = buffers_.host_rows.span().data();
  for (const auto& part : {batch.tokens, batch.slots, batch.positions}) {
    to = std::ranges::copy(part, to).out;
  }
  std::ranges::copy(draws, buffers_.host_draws.span().begin());
  if (n_outputs == n_rows && n_rows <= kGraphRows) {
    auto graph = graphs_.find(pass);
    if (graph == graphs_.end()) {
      if (graphs_.size() >= kMaxGraphs) graphs_.clear();
      cuda::Graph captured(stream_, [&] { queue(pass, batch.outputs, *paged); });
      graph = graphs_.emplace(pass, std::move(captured)).first;
    }
    graph->second.launch(stream_);
  } else {
    queue(pass, batch.outputs, *paged);
  }
  stream_.synchronize();
}

void CudaTransformer::queue(const PassShape& pass, std::span<const std::int32_t> outputs,
                            const CudaKvCache& cache) {
  const ModelConfig& c = config();
  Buffers& b = buffers_;
  const auto n_ints = static_cast<std::size_t>(3 * pass.n_rows);
  cuda::copy_bytes_in(reinterpret_cast<std::byte*>(b.rows.data()), b.host_rows.span().data(),
                      n_ints * sizeof(std::int32_t), stream_);
  const Matrix r = matrix(b.r, pass.n_rows, c.d_model), n = matrix(b.n, pass.n_rows, c.d_model);
  const Matrix t = matrix(b.t, pass.n_rows, c.d_model);
  cuda::embed(weights_.embedding, b.rows.data(), c.embedding_scale, r, stream_);
  cuda::rms_norm(r, weights_.layers[0].attn_norm.data(), c.norm_eps, n, stream_);
  for (int layer = 0; layer < c.n_layers; ++layer) {
    const LayerWeights& w = weights_.layers[static_cast<std::size_t>(layer)];
    queue_attention(layer, pass, cache.layer(layer));
    cuda::add_rms_norm(r, t, w.mlp_norm.data(), c.norm_eps, n, stream_);
    queue_mlp(layer, pass.n_rows);
    if (layer + 1 == c.n_layers) break;
    const LayerWeights& next = weights_.layers[static_cast<std::size_t>(layer) + 1];
    cuda::add_rms_norm(r, t, next.attn_norm.data(), c.norm_eps, n, stream_);
  }
  if (outputs.empty()) return;

  // Only the rows that are wanted see the head.
  const Matrix wanted = matrix(b.wanted, pass.n_outputs, c.d_model);
  const Matrix logits = matrix(b.logits, pass.n_outputs, c.vocab_size);
  if (pass.n_outputs == pass.n_rows) {
    cuda::add_rms_norm(r, t, weights_.output_norm.data(), c.norm_eps, wanted, stream_);
  } else {
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      const Matrix row = r.slice(outputs[i], 1);
      cuda::add_rms_norm(row, t.slice(outputs[i], 1), weights_.output_norm.data(), c.norm_eps,
                         wanted.slice(static_cast<std::int64_t>(i), 1), stream_);
    }
  }
  const cuda::Product head{weights_.head, wanted, nullptr, logits};
  queue_products({&head, 1});
  const auto out = static_cast<std::size_t>(pass.n_outputs);
  if (!pass.draws) {
    cuda::copy_bytes_out(b.host_logits.span().data(), reinterpret_cast<std::byte*>(b.logits.data()),
                         out * static_cast<std::size_t>(c.vocab_size) * sizeof(float), stream_);
    return;
  }
  cuda::copy_bytes_in(reinterpret_cast<std::byte*>(b.draws.data()), b.host_draws.span().data(),
                      out * sizeof(kernels::Draw), stream_);
  cuda::sample(logits, b.draws.data(), b.ids.data(), b.sample.data(), stream_);
  cuda::copy_bytes_out(b.host_ids.span().data(), reinterpret_cast<std::byte*>(b.ids.data()),
                       out * sizeof(std::int32_t), stream_);
}

void CudaTransformer::queue_products(std::span<const cuda::Product> products) {
  if (products.front().x.rows > kGraphRows) {
    cuda::gemm(*blas_, products, buffers_.gemm, stream_);
  } else {
    cuda::linear(products, stream_);
  }
}

// t = post_attn_norm?(W_o attention(rope(q_norm?(W_q n)), …)).
void CudaTransformer::queue_attention(int layer, const PassShape& pass,
                                      const cuda::PagedKv& cache) {
  const ModelConfig& c = config();
  const Buffers& b = buffers_;
  const LayerWeights& w = weights_.layers[static_cast<std::size_t>(layer)];
  const ModelConfig::Layer& at = c.layers[static_cast<std::size_t>(layer)];
  const std::int64_t rows = pass.n_rows;
  const Matrix n = matrix(b.n, rows, c.d_model), t = matrix(b.t, rows, c.d_model);
  const Matrix q = matrix(b.q, rows, heads(c)), mixed = matrix(b.mixed, rows, heads(c));
  const Matrix k = matrix(b.k, rows, kv_heads(c)), v = matrix(b.v, rows, kv_heads(c));
  const std::int32_t* slots = b.rows.data() + rows;
  const std::int32_t* positions = slots + rows;
  const std::array<cuda::Product, 3> products = {
      cuda::Product{w.w_q, n, nullptr, q}, {w.w_k, n, nullptr, k}, {w.w_v, n, nullptr, v}};
  queue_products(products);
  norm_heads(q, w.q_norm, c, stream_);
  norm_heads(k, w.k_norm, c, stream_);
  const float* freq = weights_.rope_freq[static_cast<std::size_t>(layer)].data();
  cuda::rope(q, c.head_dim, positions, freq, c.rope_style, stream_);
  cuda::rope(k, c.head_dim, positions, freq, c.rope_style, stream_);
  cuda::store_kv(k, v, {slots, positions}, cache, stream_);
  const cuda::AttentionShape shape{c.n_heads, c.attention_scale, at.window, pass.max_positions};
  if (rows > kGraphRows) {
    cuda::prompt_attention(q, {slots, positions}, cache, shape, mixed, stream_);
  } else {
    for (std::int64_t first = 0; first < rows; first += kAttentionRows) {
      const std::int64_t some = std::min(kAttentionRows, rows - first);
      cuda::attention(q.slice(first, some), {slots + first, positions + first}, cache, shape,
                      mixed.slice(first, some), b.attention.data(), stream_);
    }
  }
  const cuda::Product out{w.w_o, mixed, nullptr, t};
  queue_products({&out, 1});
  if (!w.post_attn_norm.empty()) {
    cuda::rms_norm(t, w.post_attn_norm.data(), c.norm_eps, t, stream_);
  }
}

// t = post_mlp_norm?(mlp(n)).
void CudaTransformer::queue_mlp(int layer, std::int64_t n_rows) {
  const ModelConfig& c = config();
  const Buffers& b = buffers_;
  const LayerWeights& w = weights_.layers[static_cast<std::size_t>(layer)];
  const Matrix n = matrix(b.n, n_rows, c.d_model), t = matrix(b.t, n_rows, c.d_model);
  if (const auto* dense = std::get_if<DenseMlp>(&w.mlp)) {
    const Matrix gate = matrix(b.gate, n_rows, c.d_ff), up = matrix(b.up, n_rows, c.d_ff);
    const std::array<cuda::Product, 2> products = {cuda::Product{dense->w_gate, n, nullptr, gate},
                                                   {dense->w_up, n, nullptr, up}};
    queue_products(products);
    cuda::gated_activation(dense->phi, gate, up, gate, stream_);
    const cuda::Product down{dense->w_down, gate, nullptr, t};
    queue_products({&down, 1});
  } else if (const auto* self = std::get_if<kernels::SelfRoutedView>(&w.mlp)) {
    if (n_rows > kGraphRows) {
      cuda::self_routed_batch(*blas_, *self, n, t, b.gemm.data(), stream_);
    } else {
      cuda::self_routed(*self, n, t, b.self_routed.data(), stream_);
    }
  } else if (const auto* general = std::get_if<kernels::MixtureView>(&w.mlp)) {
    cuda::mixture(*general, n, t, nullptr, nullptr, b.mixture.data(), stream_);
  } else {
    const auto& moe = std::get<kernels::SecretMoeView>(w.mlp);
    if (n_rows > kGraphRows) {
      cuda::secret_moe_batch(moe, n, t, b.selected.data(), b.moe_batch.data(), stream_);
    } else {
      for (std::int64_t row = 0; row < n_rows; ++row) {
        cuda::secret_moe_token(moe, n.slice(row, 1), t.slice(row, 1), b.selected.data(),
                               b.moe.data(), stream_);
      }
    }
  }
  if (!w.post_mlp_norm.empty()) {
    cuda::rms_norm(t, w.post_mlp_norm.data(), c.norm_eps, t, stream_);
  }
}

}  // namespace moesaic::models
