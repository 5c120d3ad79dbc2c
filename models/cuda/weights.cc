#include "models/cuda/weights.h"

#include <map>
#include <variant>

#include "kernels/rope.h"

namespace moesaic::models {
namespace {

// Calls visit(view or span) for every weight that a layer reads.
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
  auto* secret = std::get_if<kernels::SecretMoeView>(&layer.mlp);
  if (secret == nullptr) return;  // CudaTransformer has refused the other form
  auto& moe = *secret;
  for (WeightView* w :
       {&moe.shared, &moe.experts, &moe.router_v, &moe.router_u, &moe.bypass_q, &moe.bypass_p}) {
    visit(*w);
  }
  for (auto* values : {&moe.expert_mean, &moe.router_bias, &moe.bias}) visit(*values);
}

std::size_t bytes_of(const WeightView& w) { return static_cast<std::size_t>(w.bytes()); }
std::size_t bytes_of(std::span<const float> values) { return values.size_bytes(); }

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
