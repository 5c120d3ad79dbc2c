#include "models/cuda/weights.h"

#include <map>
#include <variant>

#include "kernels/cuda/base/column_panels.h"
#include "kernels/cuda/self_routed.h"
#include "kernels/rope.h"

namespace moesaic::models {
namespace {

// A matrix that is read by columns; they go where `at` is.
struct Columns {
  WeightView& w;
  const std::byte*& at;
};

// Calls visit(view or span or Columns) for every weight that a layer reads.
template <class Visit>
void for_each_weight(LayerWeights& layer, Visit visit) {
  for (auto* norm : {&layer.attn_norm, &layer.q_norm, &layer.k_norm, &layer.post_attn_norm,
                     &layer.mlp_norm, &layer.post_mlp_norm}) {
    visit(*norm);
  }
  for (WeightView* w : {&layer.w_q, &layer.w_k, &layer.w_v, &layer.w_o}) visit(*w);
  if (auto* dense = std::get_if<DenseMlp>(&layer.mlp)) {
    for (WeightView* w : {&dense->w_gate, &dense->w_up, &dense->w_down}) visit(*w);
    return;
  }
  if (auto* self = std::get_if<kernels::SelfRoutedView>(&layer.mlp)) {
    const auto matrix = [&](bool by_columns, WeightView& w, const std::byte*& columns) {
      columns = nullptr;
      by_columns ? visit(Columns{w, columns}) : visit(w);
    };
    matrix(cuda::reads_gate_by_columns(*self), self->w_gate, self->gate_columns);
    matrix(cuda::reads_up_by_columns(*self), self->w_up, self->up_parts);
    matrix(cuda::reads_down_by_columns(*self), self->w_down, self->down_columns);
    for (auto* values : {&self->input_threshold, &self->gate_threshold, &self->hidden_threshold}) {
      visit(*values);
    }
    return;
  }
  if (auto* mixture = std::get_if<kernels::MixtureView>(&layer.mlp)) {
    for (WeightView* w : {&mixture->shared, &mixture->experts, &mixture->router_v,
                          &mixture->router_u, &mixture->bypass_q, &mixture->bypass_p}) {
      visit(*w);
    }
    for (auto* values : {&mixture->shared_bias, &mixture->expert_bias, &mixture->expert_mean,
                         &mixture->router_bias, &mixture->bias}) {
      visit(*values);
    }
    return;
  }
  auto& moe = std::get<kernels::SecretMoeView>(layer.mlp);
  for (WeightView* w :
       {&moe.shared, &moe.experts, &moe.router_v, &moe.router_u, &moe.bypass_q, &moe.bypass_p}) {
    visit(*w);
  }
  for (auto* values : {&moe.expert_mean, &moe.router_bias, &moe.bias}) visit(*values);
}

std::size_t bytes_of(const WeightView& w) { return static_cast<std::size_t>(w.bytes()); }
std::size_t bytes_of(std::span<const float> values) { return values.size_bytes(); }
std::size_t bytes_of(const Columns& c) {
  return static_cast<std::size_t>(cuda::column_panels(c.w).bytes());
}

std::map<double, std::vector<float>> rope_tables(const ModelConfig& config) {
  std::map<double, std::vector<float>> tables;
  for (const ModelConfig::Layer& layer : config.layers) {
    auto [table, added] = tables.try_emplace(layer.rope_base);
    if (added) table->second = kernels::rope_frequencies(config.head_dim, layer.rope_base);
  }
  return tables;
}

std::size_t arena_bytes(const Checkpoint& checkpoint) {
  std::size_t total = 0;
  const auto add = [&](const auto& w) { total += cuda::Arena::bytes_for<std::byte>(bytes_of(w)); };
  add(checkpoint.embedding);
  if (checkpoint.head.data != checkpoint.embedding.data) add(checkpoint.head);
  add(checkpoint.output_norm);
  for (LayerWeights layer : checkpoint.layers) for_each_weight(layer, add);
  for (const auto& [base, table] : rope_tables(checkpoint.config)) {
    add(std::span<const float>(table));
  }
  return total;
}

// Moves views to copies in the arena.
class Upload {
 public:
  Upload(cuda::Arena& arena, const cuda::Stream& stream) : arena_(arena), stream_(stream) {}

  void operator()(WeightView& w) const {
    w.data = copy(w.data, bytes_of(w));
    w.panels = nullptr;
  }
  void operator()(const Columns& c) const {
    std::vector<std::byte> packed(bytes_of(c));
    cuda::pack_column_panels(c.w, packed.data());
    c.at = copy(packed.data(), packed.size());
    stream_.synchronize();  // before `packed` goes
    c.w.data = c.w.panels = nullptr;
  }
  void operator()(std::span<const float>& values) const {
    values = {reinterpret_cast<const float*>(copy(values.data(), bytes_of(values))), values.size()};
  }

 private:
  const std::byte* copy(const void* host, std::size_t bytes) const {
    std::byte* device = arena_.take<std::byte>(bytes).data();
    cuda::copy_bytes_in(device, host, bytes, stream_);
    return device;
  }

  cuda::Arena& arena_;
  const cuda::Stream& stream_;
};

}  // namespace

CudaWeights::CudaWeights(const Checkpoint& checkpoint, const cuda::Stream& stream)
    : embedding(checkpoint.embedding),
      head(checkpoint.head),
      output_norm(checkpoint.output_norm),
      layers(checkpoint.layers),
      arena_(arena_bytes(checkpoint)) {
  const Upload upload(arena_, stream);
  const bool tied = head.data == embedding.data;
  upload(embedding);
  if (tied) {
    head = embedding;
  } else {
    upload(head);
  }
  upload(output_norm);
  for (LayerWeights& layer : layers) for_each_weight(layer, upload);
  const auto tables = rope_tables(checkpoint.config);
  std::map<double, std::span<const float>> copies;
  for (const auto& [base, table] : tables) upload(copies[base] = table);
  for (const ModelConfig::Layer& layer : checkpoint.config.layers) {
    rope_freq.push_back(copies.at(layer.rope_base));
  }
  stream.synchronize();  // the host's memory may go now
}

}  // namespace moesaic::models
