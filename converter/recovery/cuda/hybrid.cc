#include "converter/recovery/cuda/hybrid.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "converter/recovery/head.h"
#include "converter/recovery/unpack.h"
#include "kernels/base/error.h"
#include "kernels/cuda/embedding.h"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/training/divergence.h"
#include "kernels/cuda/training/elementwise.h"
#include "kernels/cuda/training/experts.h"
#include "kernels/rope.h"

namespace moesaic::converter {
namespace {

std::int64_t elements(const WeightView& w) { return w.rows * w.cols; }

// The three matrices of a gated MLP: [d_ff, d_model] twice, [d_model, d_ff].
std::array<const WeightView*, 3> matrices(const models::DenseMlp& mlp) {
  return {&mlp.w_gate, &mlp.w_up, &mlp.w_down};
}

}  // namespace

MoeShape largest_moe(const models::Checkpoint& checkpoint) {
  MoeShape most;
  for (const models::LayerWeights& layer : checkpoint.layers) {
    const auto* moe = std::get_if<kernels::SecretMoeView>(&layer.mlp);
    if (moe == nullptr) continue;
    const MoeShape own = shape_of(*moe);
    for (const auto size : {&MoeShape::n_shared, &MoeShape::n_experts, &MoeShape::n_active,
                            &MoeShape::router_rank, &MoeShape::bypass_rank}) {
      most.*size = std::max(most.*size, own.*size);
    }
  }
  return most;
}

void CudaTape::walk(DeviceParts& take, const models::ModelConfig& c, const MoeShape& moe,
                    std::int64_t rows) {
  const std::int64_t q_cols = rows * c.n_heads * c.head_dim, d = rows * c.d_model;
  const std::int64_t kv_cols = rows * c.n_kv_heads * c.head_dim;
  const std::int64_t d_ff = rows * std::max(c.d_ff, moe.n_neurons());
  for (auto* part : {&q, &q_raw, &mixed}) take(*part, q_cols);
  for (auto* part : {&k, &v, &k_raw}) take(*part, kv_cols);
  take(lse, rows * c.n_heads);
  for (auto* part : {&out, &mlp_out, &r_mid}) take(*part, d);
  for (auto* part : {&x, &large}) take(*part, d);
  for (auto* part : {&h, &slope_gate, &slope_up}) take(*part, d_ff);
  take(mask, std::max(d, rows * moe.n_experts));
  for (auto* part : {&gap, &centred, &kappa}) take(*part, rows * moe.n_experts);
  take(z, rows * moe.router_rank);
  take(qx, rows * moe.bypass_rank);
  take(squared_gap, moe.n_experts > 0 ? rows : 0);
}

CudaScratch::CudaScratch(const models::Checkpoint& hybrid, std::int64_t n_rows, std::int64_t ctx)
    : rows(n_rows),
      n_ctx(ctx),
      head_rows(std::min(
          n_rows,
          std::clamp<std::int64_t>(
              kHeadTileElements / std::max<std::int64_t>(hybrid.config.vocab_size, 1), 16, 512))) {
  const models::ModelConfig& c = hybrid.config;
  const MoeShape moe = largest_moe(hybrid);
  const std::int64_t q_cols = rows * c.n_heads * c.head_dim;
  const std::int64_t kv_cols = rows * c.n_kv_heads * c.head_dim;
  const auto squares = static_cast<std::int64_t>(cuda::window_attention_workspace(
      {.n_heads = c.n_heads, .n_kv_heads = c.n_kv_heads, .head_dim = c.head_dim, .n_ctx = ctx}));
  arena_ = DeviceParts::divide([&](DeviceParts& take) {
    for (auto* part : {&r, &dr, &x, &y}) take(*part, rows * c.d_model);
    for (auto* part : {&gate, &up}) take(*part, rows * std::max(c.d_ff, moe.n_neurons()));
    for (auto* part : {&d_mixed, &dq}) take(*part, q_cols);
    for (auto* part : {&dk, &dv}) take(*part, kv_cols);
    take(attention, squares);
    for (auto* part : {&teacher_logits, &logits}) take(*part, head_rows * c.vocab_size);
    take(d_logits, head_rows * c.vocab_size);
    take(divergence, rows);
    take(operand, std::max(rows * c.d_model, q_cols));
    take(hidden, rows * c.d_model);
    take(positions, rows);
    take(ignored, 3);
    take(ranks, rows * std::max(moe.router_rank, moe.bypass_rank));
    take(rank_operand, rows * std::max(moe.router_rank, moe.bypass_rank));
    take(scores, rows * moe.n_experts);
    take(weight, moe.n_experts > 0 ? rows : 0);
    take(ids, rows * moe.n_active);
    tape.walk(take, c, moe, rows);
  });
  std::vector<std::int32_t> places(static_cast<std::size_t>(rows));
  for (std::size_t t = 0; t < places.size(); ++t) {
    places[t] = static_cast<std::int32_t>(static_cast<std::int64_t>(t) % n_ctx);
  }
  const cuda::Stream stream;
  copy_in<std::int32_t>(places, positions, stream);
  zero(ignored, stream);
  stream.synchronize();
}

cuda::Threshold CudaConverted::threshold_of(SelfRoutedVector which) const {
  if (threshold[which].empty()) return {};
  return {threshold[which].data(), host->self_routed()->layer.factors()[which]};
}

CudaHybrid::CudaHybrid(const models::Checkpoint& checkpoint, Hybrid<Bfloat16>* learns,
                       bool recompute, CudaScratch& scratch, cuda::Blas& blas,
                       const cuda::Stream& stream)
    : config_(checkpoint.config),
      s_(scratch),
      blas_(blas),
      stream_(stream),
      recompute_(recompute),
      learns_(learns != nullptr),
      layers_(checkpoint.layers.size()) {
  const std::string file = checkpoint.file->path().string();
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const models::Mlp& mlp = checkpoint.layers[l].mlp;
    if (const auto* dense = std::get_if<models::DenseMlp>(&mlp)) {
      layers_[l].phi = dense->phi;
      continue;
    }
    require<InputError>(learns_, "{}: layer {}: expected a dense one", file, l);
    if (const auto* routed = std::get_if<kernels::SelfRoutedView>(&mlp)) {
      layers_[l].phi = routed->phi;
    }
    layers_[l].converted = converted_.size();
    CudaConverted& own = converted_.emplace_back();
    own.host = &learns->converted()[converted_.size() - 1];
  }
  take_memory(checkpoint);
  copy_weights(checkpoint);
  if (learns_) put();
}

std::int64_t CudaHybrid::first_converted() const {
  const auto at = std::find_if(layers_.begin(), layers_.end(),
                               [](const Layer& l) { return l.converted.has_value(); });
  return at - layers_.begin();
}

void CudaHybrid::take_memory(const models::Checkpoint& checkpoint) {
  const models::ModelConfig& c = config_;
  const bool tapes = learns_ && !recompute_;
  tapes_.resize(tapes ? layers_.size() : 0);
  inputs_.resize(layers_.size());
  const std::int64_t matrix = c.d_model * c.d_ff;
  arena_ = DeviceParts::divide([&](DeviceParts& take) {
    take(embedding_bytes_, checkpoint.embedding.bytes());
    take(output_norm_, c.d_model);
    if (learns_) take(head_, elements(checkpoint.head));
    take(counts_, 3 * std::ssize(converted_));
    take(auxiliary_, std::ssize(converted_));
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const models::LayerWeights& from = checkpoint.layers[l];
      Attention& a = layers_[l].attention;
      const std::array<const WeightView*, kAttentionMatrices> w = {&from.w_q, &from.w_k, &from.w_v,
                                                                   &from.w_o};
      for (std::size_t m = 0; m < w.size(); ++m) take(a.w[m], elements(*w[m]));
      const auto vector = [&](std::span<float>& part, std::span<const float> values) {
        take(part, static_cast<std::int64_t>(values.size()));
      };
      vector(a.norm, from.attn_norm);
      vector(a.q_norm, from.q_norm);
      vector(a.k_norm, from.k_norm);
      vector(a.post_norm, from.post_attn_norm);
      vector(layers_[l].mlp_norm, from.mlp_norm);
      vector(layers_[l].post_mlp_norm, from.post_mlp_norm);
      for (auto* part : {&a.freq, &a.back_freq}) take(*part, c.head_dim / 2);
      if (!layers_[l].converted) {
        for (auto& part : layers_[l].dense) take(part, matrix);
      }
      if (learns_ && static_cast<std::int64_t>(l) >= first_converted()) {
        take(inputs_[l], s_.rows * c.d_model);
        const auto* moe = std::get_if<kernels::SecretMoeView>(&from.mlp);
        if (tapes) tapes_[l].walk(take, c, moe == nullptr ? MoeShape() : shape_of(*moe), s_.rows);
      }
    }
    for (CudaConverted& own : converted_) take_memory(take, own);
  });
  for (std::size_t i = 0; i < converted_.size(); ++i) {
    converted_[i].counts = counts_.subspan(3 * i, 3);
    converted_[i].auxiliary = auxiliary_.subspan(i, 1);
  }
}

void CudaHybrid::take_memory(DeviceParts& take, CudaConverted& own) {
  const auto tensors = own.host->tensors();
  own.tensors.resize(tensors.size());
  const bool is_moe = own.host->moe() != nullptr;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::int64_t n = std::ssize(tensors[i].value);
    take(own.tensors[i].value, n);
    take(own.tensors[i].gradient, n);
    // Biases are added; a router's V is multiplied in float32 and meets no gradient behind it.
    const bool multiplied = !is_moe || (i != kMoeBias && i != kRouterV && i != kRouterBias);
    take(own.tensors[i].operand, multiplied ? n : 0);
  }
  if (is_moe) {
    const std::int64_t n = own.host->moe()->layer.shape().n_neurons();
    for (auto* part : {&own.mean, &own.norm}) take(*part, n);
    return;
  }
  const SelfRoutedThresholds<float>& given = own.host->self_routed()->layer.given();
  take(own.threshold[kInput], std::ssize(given.input));
  take(own.threshold[kGate], std::ssize(given.gate));
  take(own.threshold[kHidden], std::ssize(given.hidden));
}

void CudaHybrid::copy_weights(const models::Checkpoint& checkpoint) {
  const std::string file = checkpoint.file->path().filename().string();
  std::vector<std::uint16_t> bits;
  // The host's memory is used again, so each copy is waited for.
  const auto matrix = [&](const WeightView& w, const std::string& name,
                          std::span<std::uint16_t> to) {
    bits.resize(static_cast<std::size_t>(elements(w)));
    unpack_operand<Bfloat16>(w, fmt::format("{}: {}", file, name), {bits.data(), w.rows, w.cols});
    copy_in<std::uint16_t>(bits, to, stream_);
    stream_.synchronize();
  };
  const auto vector = [&](std::span<const float> values, std::span<float> to) {
    copy_in<float>(values, to, stream_);
    stream_.synchronize();
  };
  embedding_ = checkpoint.embedding;
  embedding_.panels = nullptr;
  cuda::copy_bytes_in(embedding_bytes_.data(), embedding_.data, embedding_bytes_.size(), stream_);
  stream_.synchronize();
  embedding_.data = embedding_bytes_.data();
  vector(checkpoint.output_norm, output_norm_);
  if (learns_) matrix(checkpoint.head, "output.weight", head_);
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const models::LayerWeights& from = checkpoint.layers[l];
    const models::ModelConfig::Layer& config = config_.layers[l];
    Attention& a = layers_[l].attention;
    const std::string name = fmt::format("blk.{}.", l);
    const std::array<const WeightView*, kAttentionMatrices> w = {&from.w_q, &from.w_k, &from.w_v,
                                                                 &from.w_o};
    for (std::size_t m = 0; m < w.size(); ++m) matrix(*w[m], name + kAttentionNames[m], a.w[m]);
    vector(from.attn_norm, a.norm);
    vector(from.q_norm, a.q_norm);
    vector(from.k_norm, a.k_norm);
    vector(from.post_attn_norm, a.post_norm);
    vector(from.mlp_norm, layers_[l].mlp_norm);
    vector(from.post_mlp_norm, layers_[l].post_mlp_norm);
    a.window = config.window;
    std::vector<float> freq = kernels::rope_frequencies(config_.head_dim, config.rope_base);
    vector(freq, a.freq);
    // A rotation's transpose is its inverse: the gradient turns back.
    for (float& f : freq) f = -f;
    vector(freq, a.back_freq);
    if (const auto* dense = std::get_if<models::DenseMlp>(&from.mlp)) {
      const auto parts = matrices(*dense);
      constexpr std::array<const char*, 3> kNames = {"ffn_gate", "ffn_up", "ffn_down"};
      for (std::size_t m = 0; m < 3; ++m) matrix(*parts[m], name + kNames[m], layers_[l].dense[m]);
    }
  }
  zero(counts_, stream_);
}

void CudaHybrid::put() {
  for (CudaConverted& own : converted_) {
    const auto tensors = own.host->tensors();
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      copy_in<float>(tensors[i].value, own.tensors[i].value, stream_);
    }
    if (const TrainedMoe<Bfloat16>* moe = own.host->moe()) {
      copy_in<float>(moe->layer.mean(), own.mean, stream_);
      continue;
    }
    const SelfRoutedThresholds<float>& given = own.host->self_routed()->layer.given();
    copy_in<float>(given.input, own.threshold[kInput], stream_);
    copy_in<float>(given.gate, own.threshold[kGate], stream_);
    copy_in<float>(given.hidden, own.threshold[kHidden], stream_);
  }
  clear_gradients();
  refresh();
}

void CudaHybrid::fetch() {
  for (CudaConverted& own : converted_) {
    const auto tensors = own.host->tensors();
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      copy_out<float>(own.tensors[i].value, tensors[i].value, stream_);
    }
  }
}

void CudaHybrid::clear_gradients() {
  for (CudaConverted& own : converted_) {
    for (const CudaTensor& t : own.tensors) zero(t.gradient, stream_);
  }
}

void CudaHybrid::refresh() {
  for (CudaConverted& own : converted_) {
    for (const CudaTensor& t : own.tensors) {
      cuda::to_bf16(t.value.data(), std::ssize(t.operand), t.operand.data(), stream_);
    }
    if (own.host->moe() == nullptr) continue;
    cuda::row_norms(view(own.tensors[kMoeDown].value, std::ssize(own.norm), config_.d_model),
                    own.norm.data(), stream_);
  }
}

CudaTape& CudaHybrid::tape(std::size_t layer) {
  const bool own = !tapes_.empty() && static_cast<std::int64_t>(layer) >= first_converted();
  return own ? tapes_[layer] : s_.tape;
}

void CudaHybrid::embed(std::span<const std::int32_t> tokens) {
  const auto rows = static_cast<std::int64_t>(tokens.size());
  require<ShapeError>(rows <= s_.rows && rows % s_.n_ctx == 0,
                      "recovery: {} rows on CUDA, expected whole windows of {}, {} at most", rows,
                      s_.n_ctx, s_.rows);
  cuda::embed(embedding_, tokens.data(), config_.embedding_scale, view(s_.r, rows, config_.d_model),
              stream_);
}

// The stream before each layer from the first converted one on is kept where wanted.
void CudaHybrid::run_layers(std::int64_t rows, bool keep) {
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    if (keep && !inputs_[l].empty()) {
      cuda::copy(s_.r.data(), rows * config_.d_model, inputs_[l].data(), stream_);
    }
    CudaTape& own = keep ? tape(l) : s_.tape;
    attention_forward(layers_[l], own, rows);
    mlp_forward(layers_[l], own, rows, true);
  }
}

void CudaHybrid::hidden(std::span<const std::int32_t> tokens, std::uint16_t* out) {
  const auto rows = static_cast<std::int64_t>(tokens.size());
  embed(tokens);
  run_layers(rows, false);
  const Matrix x = view(s_.x, rows, config_.d_model);
  cuda::rms_norm(view(s_.r, rows, config_.d_model), output_norm_.data(), config_.norm_eps, x,
                 stream_);
  cuda::to_bf16(x.data, rows * config_.d_model, out, stream_);
}

// The divergence of the stream r; with `back`, dr is its gradient in r.
void CudaHybrid::head(std::int64_t rows, const std::uint16_t* teacher, double unit, bool back,
                      double* kl) {
  const std::int64_t d = config_.d_model, vocab = config_.vocab_size;
  const Matrix r = view(s_.r, rows, d), x = view(s_.x, rows, d), dr = view(s_.dr, rows, d);
  const cuda::Bf16Matrix all(teacher, rows, d), own(s_.hidden.data(), rows, d);
  const cuda::Bf16Matrix w(head_.data(), vocab, d);
  cuda::rms_norm(r, output_norm_.data(), config_.norm_eps, x, stream_);
  cuda::to_bf16(x.data, rows * d, s_.hidden.data(), stream_);
  for (std::int64_t first = 0; first < rows; first += s_.head_rows) {
    const std::int64_t n = std::min(s_.head_rows, rows - first);
    const Matrix p = view(s_.teacher_logits, n, vocab), q = view(s_.logits, n, vocab);
    blas_.multiply(false, true, all.slice(first, n), w, false, p);
    blas_.multiply(false, true, own.slice(first, n), w, false, q);
    cuda::kl_divergence(p, q, static_cast<float>(unit), s_.divergence.data() + first,
                        back ? s_.d_logits.data() : nullptr, stream_);
    if (back) {
      blas_.multiply(false, false, cuda::Bf16Matrix(s_.d_logits.data(), n, vocab), w, false,
                     dr.slice(first, n));
    }
  }
  cuda::add_up(s_.divergence.data(), rows, kl, stream_);
  if (back) {
    cuda::rms_norm_backward(r, output_norm_.data(), config_.norm_eps, dr, false, dr, stream_);
  }
}

void CudaHybrid::divergence(std::span<const std::int32_t> tokens, const std::uint16_t* teacher,
                            double* kl) {
  embed(tokens);
  run_layers(static_cast<std::int64_t>(tokens.size()), false);
  head(static_cast<std::int64_t>(tokens.size()), teacher, 1, false, kl);
}

void CudaHybrid::gradients(std::span<const std::int32_t> tokens, const std::uint16_t* teacher,
                           std::int64_t n_step, double* kl) {
  const auto rows = static_cast<std::int64_t>(tokens.size());
  embed(tokens);
  run_layers(rows, true);
  head(rows, teacher, 1 / static_cast<double>(n_step), true, kl);
  const std::int64_t first = first_converted();
  for (std::int64_t l = std::ssize(layers_) - 1; l >= first; --l) {
    const auto index = static_cast<std::size_t>(l);
    const Layer& layer = layers_[index];
    CudaTape& own = tape(index);
    const ConstMatrix input(inputs_[index].data(), rows, config_.d_model);
    if (recompute_) {
      cuda::copy(input.data, rows * config_.d_model, s_.r.data(), stream_);
      attention_forward(layer, own, rows);
      mlp_forward(layer, own, rows, false);
    }
    // Nothing below the first converted layer's MLP wants a gradient.
    mlp_backward(layer, own, rows, n_step, l > first);
    if (l > first) attention_backward(layer, own, input, rows);
  }
}

}  // namespace moesaic::converter
