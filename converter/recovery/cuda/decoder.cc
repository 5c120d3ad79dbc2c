#include "converter/recovery/cuda/decoder.h"

#include <algorithm>

#include "converter/recovery/head.h"
#include "converter/recovery/unpack.h"
#include "kernels/base/error.h"
#include "kernels/cuda/embedding.h"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/rope.h"
#include "kernels/cuda/training/divergence.h"
#include "kernels/cuda/training/elementwise.h"
#include "kernels/rope.h"

namespace moesaic::converter {
namespace {

using cuda::Bf16Matrix;

std::int64_t elements(const WeightView& w) { return w.rows * w.cols; }

template <class T>
Bf16Matrix bits(std::span<T> part, std::int64_t rows, std::int64_t cols) {
  return {part.data(), rows, cols};
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

CudaScratch::CudaScratch(const models::Checkpoint& checkpoint, std::int64_t n_rows,
                         std::int64_t ctx, CudaWork work)
    : rows(n_rows),
      n_ctx(ctx),
      head_rows(std::min(
          n_rows, std::clamp<std::int64_t>(
                      kHeadTileElements / std::max<std::int64_t>(checkpoint.config.vocab_size, 1),
                      16, 512))) {
  const models::ModelConfig& c = checkpoint.config;
  const MoeShape moe = largest_moe(checkpoint);
  const std::int64_t q_cols = rows * c.n_heads * c.head_dim;
  const std::int64_t kv_cols = rows * c.n_kv_heads * c.head_dim;
  const auto squares = static_cast<std::int64_t>(cuda::window_attention_workspace(
      {.n_heads = c.n_heads, .n_kv_heads = c.n_kv_heads, .head_dim = c.head_dim, .n_ctx = ctx}));
  arena_ = DeviceParts::divide([&](DeviceParts& take) {
    for (auto* part : {&r, &x, &y}) take(*part, rows * c.d_model);
    for (auto* part : {&gate, &up}) take(*part, rows * std::max(c.d_ff, moe.n_neurons()));
    if (work == CudaWork::Training) {
      take(dr, rows * c.d_model);
      for (auto* part : {&d_mixed, &dq}) take(*part, q_cols);
      for (auto* part : {&dk, &dv}) take(*part, kv_cols);
      take(d_logits, head_rows * c.vocab_size);
    }
    take(attention, squares);
    for (auto* part : {&teacher_logits, &logits}) take(*part, head_rows * c.vocab_size);
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

CudaDecoder::CudaDecoder(const models::Checkpoint& checkpoint, const CudaWeights& weights,
                         CudaScratch& scratch, cuda::Blas& blas, const cuda::Stream& stream)
    : config_(checkpoint.config),
      s_(scratch),
      blas_(blas),
      stream_(stream),
      layers_(checkpoint.layers.size()) {
  take_memory(checkpoint, weights);
  copy_weights(checkpoint, weights);
}

void CudaDecoder::take_memory(const models::Checkpoint& checkpoint, const CudaWeights& weights) {
  const models::ModelConfig& c = config_;
  arena_ = DeviceParts::divide([&](DeviceParts& take) {
    take(embedding_bytes_, checkpoint.embedding.bytes());
    take(output_norm_, c.d_model);
    if (weights.head) take(head_, elements(checkpoint.head));
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const models::LayerWeights& from = checkpoint.layers[l];
      Attention& a = layers_[l].attention;
      const std::array<const WeightView*, kAttentionMatrices> w = {&from.w_q, &from.w_k, &from.w_v,
                                                                   &from.w_o};
      for (std::size_t m = 0; m < w.size(); ++m) take(a.w[m], elements(*w[m]));
      const auto vector = [&](std::span<float>& to, std::span<const float> values) {
        take(to, std::ssize(values));
      };
      vector(a.norm, from.attn_norm);
      vector(a.q_norm, from.q_norm);
      vector(a.k_norm, from.k_norm);
      vector(a.post_norm, from.post_attn_norm);
      vector(layers_[l].mlp_norm, from.mlp_norm);
      vector(layers_[l].post_mlp_norm, from.post_mlp_norm);
      for (auto* part : {&a.freq, &a.back_freq}) take(*part, c.head_dim / 2);
      if (std::holds_alternative<models::DenseMlp>(from.mlp)) {
        for (auto& part : layers_[l].dense) take(part, c.d_model * c.d_ff);
      }
    }
  });
}

void CudaDecoder::copy_weights(const models::Checkpoint& checkpoint, const CudaWeights& weights) {
  const std::string file = checkpoint.file->path().filename().string();
  std::vector<std::uint16_t> values;
  // The host's memory is used again, so each copy is waited for.
  const auto matrix = [&](const WeightView& w, const std::string& name,
                          std::span<std::uint16_t> to) {
    values.resize(static_cast<std::size_t>(elements(w)));
    unpack_operand<Bfloat16>(w, fmt::format("{}: {}", file, name), {values.data(), w.rows, w.cols},
                             weights.finite);
    copy_in<std::uint16_t>(values, to, stream_);
    stream_.synchronize();
  };
  const auto vector = [&](std::span<const float> from, std::span<float> to) {
    copy_in<float>(from, to, stream_);
    stream_.synchronize();
  };
  embedding_ = checkpoint.embedding;
  embedding_.panels = nullptr;
  cuda::copy_bytes_in(embedding_bytes_.data(), embedding_.data, embedding_bytes_.size(), stream_);
  stream_.synchronize();
  embedding_.data = embedding_bytes_.data();
  vector(checkpoint.output_norm, output_norm_);
  if (weights.head) matrix(checkpoint.head, "output.weight", head_);
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
      layers_[l].phi = dense->phi;
      matrix(dense->w_gate, name + "ffn_gate", layers_[l].dense[0]);
      matrix(dense->w_up, name + "ffn_up", layers_[l].dense[1]);
      matrix(dense->w_down, name + "ffn_down", layers_[l].dense[2]);
    }
  }
}

CudaMlp CudaDecoder::dense_mlp(std::size_t l) const {
  const auto& w = layers_[l].dense;
  return {.phi = layers_[l].phi, .w = {w[0], w[1], w[2]}};
}

cuda::WindowShape CudaDecoder::window_shape(const Layer& layer) const {
  return {.n_heads = config_.n_heads,
          .n_kv_heads = config_.n_kv_heads,
          .head_dim = config_.head_dim,
          .scale = config_.attention_scale,
          .window = layer.attention.window,
          .n_ctx = s_.n_ctx};
}

Bf16Matrix CudaDecoder::operand(ConstMatrix x) const {
  cuda::to_bf16(x.data, x.rows * x.cols, s_.operand.data(), stream_);
  return {s_.operand.data(), x.rows, x.cols};
}

void CudaDecoder::embed(std::span<const std::int32_t> tokens, Matrix r) const {
  const auto rows = static_cast<std::int64_t>(tokens.size());
  require<ShapeError>(rows <= s_.rows && rows % s_.n_ctx == 0,
                      "recovery: {} rows on CUDA, expected whole windows of {}, {} at most", rows,
                      s_.n_ctx, s_.rows);
  cuda::embed(embedding_, tokens.data(), config_.embedding_scale, r, stream_);
}

void CudaDecoder::attention(std::size_t index, CudaTape& tape, Matrix r) const {
  const Layer& layer = layers_[index];
  const Attention& a = layer.attention;
  const std::int64_t m = r.rows, d = config_.d_model, d_head = config_.head_dim;
  const float eps = config_.norm_eps;
  const Matrix x = view(s_.x, m, d);
  const Matrix q = view(tape.q, m, q_cols()), k = view(tape.k, m, kv_cols());
  const Matrix v = view(tape.v, m, kv_cols());
  const bool normed = !a.q_norm.empty();
  const Matrix q_raw = normed ? view(tape.q_raw, m, q_cols()) : q;
  const Matrix k_raw = normed ? view(tape.k_raw, m, kv_cols()) : k;
  cuda::rms_norm(r, a.norm.data(), eps, x, stream_);
  const Bf16Matrix in = operand(x);
  blas_.multiply(false, true, in, bits(a.w[kQuery], q_cols(), d), false, q_raw);
  blas_.multiply(false, true, in, bits(a.w[kKey], kv_cols(), d), false, k_raw);
  blas_.multiply(false, true, in, bits(a.w[kValue], kv_cols(), d), false, v);
  if (normed) {
    cuda::rms_norm(heads(q_raw, d_head), a.q_norm.data(), eps, heads(q, d_head), stream_);
    cuda::rms_norm(heads(k_raw, d_head), a.k_norm.data(), eps, heads(k, d_head), stream_);
  }
  for (const Matrix& part : {q, k}) {
    cuda::rope(part, config_.head_dim, s_.positions.data(), a.freq.data(), config_.rope_style,
               stream_);
  }
  const Matrix mixed = view(tape.mixed, m, q_cols());
  cuda::window_attention(blas_, window_shape(layer), q, k, v, mixed,
                         view(tape.lse, m, config_.n_heads), s_.attention, stream_);
  const Bf16Matrix w_o = bits(a.w[kAttentionOutput], d, q_cols());
  if (a.post_norm.empty()) {
    blas_.multiply(false, true, operand(mixed), w_o, true, r);
    return;
  }
  const Matrix out = view(tape.out, m, d);
  blas_.multiply(false, true, operand(mixed), w_o, false, out);
  cuda::rms_norm(out, a.post_norm.data(), eps, x, stream_);
  cuda::add(x, r, stream_);
}

void CudaDecoder::mlp_input(std::size_t layer, ConstMatrix r, Matrix x) const {
  cuda::rms_norm(r, layers_[layer].mlp_norm.data(), config_.norm_eps, x, stream_);
}

void CudaDecoder::mlp_output(const CudaMlp& mlp, CudaTape& tape, ConstMatrix x, bool accumulate,
                             Matrix y) const {
  const std::int64_t m = x.rows, d = config_.d_model, n = config_.d_ff;
  const Matrix gate = view(s_.gate, m, n), up = view(s_.up, m, n);
  const Bf16Matrix all = bits(tape.x, m, d);
  Bf16Matrix gate_input = all, up_input = all;
  cuda::Count* neurons = nullptr;
  if (mlp.self_routed) {
    cuda::Count* to = mlp.counts == nullptr ? s_.ignored.data() : mlp.counts;
    cuda::keep_large(x, mlp.threshold[kInput], tape.x.data(), tape.large.data(), tape.mask.data(),
                     to, stream_);
    gate_input = bits(tape.large, m, d);
    if (mlp.up_by_input) up_input = gate_input;
    neurons = to + 1;
  } else {
    cuda::to_bf16(x.data, m * d, tape.x.data(), stream_);
  }
  blas_.multiply(false, true, gate_input, bits(mlp.w[0], n, d), false, gate);
  blas_.multiply(false, true, up_input, bits(mlp.w[1], n, d), false, up);
  cuda::keep_neurons(mlp.phi, gate, up, mlp.threshold[kGate], mlp.threshold[kHidden], tape.h.data(),
                     tape.slope_gate.data(), tape.slope_up.data(), neurons, stream_);
  blas_.multiply(false, true, bits(tape.h, m, n), bits(mlp.w[2], d, n), accumulate, y);
}

void CudaDecoder::add_mlp_output(std::size_t layer, ConstMatrix y, Matrix r) const {
  const std::span<float> norm = layers_[layer].post_mlp_norm;
  if (norm.empty()) {
    cuda::add(y, r, stream_);
    return;
  }
  const Matrix x = view(s_.x, y.rows, y.cols);
  cuda::rms_norm(y, norm.data(), config_.norm_eps, x, stream_);
  cuda::add(x, r, stream_);
}

void CudaDecoder::mlp(std::size_t layer, const CudaMlp& mlp, CudaTape& tape, Matrix r) const {
  const Matrix x = view(s_.x, r.rows, r.cols);
  mlp_input(layer, r, x);
  if (layers_[layer].post_mlp_norm.empty()) {
    mlp_output(mlp, tape, x, true, r);
    return;
  }
  const Matrix out = view(tape.mlp_out, r.rows, r.cols);
  mlp_output(mlp, tape, x, false, out);
  add_mlp_output(layer, out, r);
}

void CudaDecoder::hidden(ConstMatrix r, std::uint16_t* out) const {
  const Matrix x = view(s_.x, r.rows, r.cols);
  cuda::rms_norm(r, output_norm_.data(), config_.norm_eps, x, stream_);
  cuda::to_bf16(x.data, r.rows * r.cols, out, stream_);
}

void CudaDecoder::divergence(Bf16Matrix teacher, Bf16Matrix own, double unit, Matrix d_hidden,
                             double* kl) const {
  const std::int64_t rows = own.rows, vocab = config_.vocab_size;
  const bool back = d_hidden.rows > 0;
  const Bf16Matrix w = bits(head_, vocab, config_.d_model);
  for (std::int64_t first = 0; first < rows; first += s_.head_rows) {
    const std::int64_t n = std::min(s_.head_rows, rows - first);
    const Matrix p = view(s_.teacher_logits, n, vocab), q = view(s_.logits, n, vocab);
    blas_.multiply(false, true, teacher.slice(first, n), w, false, p);
    blas_.multiply(false, true, own.slice(first, n), w, false, q);
    cuda::kl_divergence(p, q, static_cast<float>(unit), s_.divergence.data() + first,
                        back ? s_.d_logits.data() : nullptr, stream_);
    if (back) {
      blas_.multiply(false, false, bits(s_.d_logits, n, vocab), w, false, d_hidden.slice(first, n));
    }
  }
  cuda::add_up(s_.divergence.data(), rows, kl, stream_);
}

}  // namespace moesaic::converter
