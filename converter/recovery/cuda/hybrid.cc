#include "converter/recovery/cuda/hybrid.h"

#include <algorithm>
#include <array>

#include "kernels/base/error.h"
#include "kernels/cuda/training/elementwise.h"
#include "kernels/cuda/training/experts.h"

namespace moesaic::converter {

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
      frozen_(checkpoint, {.head = learns_}, scratch, blas, stream),
      converted_at_(checkpoint.layers.size()) {
  check_layers(checkpoint, learns);
  if (!learns_) return;
  take_memory();
  zero(counts_, stream_);
  put();
}

void CudaHybrid::check_layers(const models::Checkpoint& checkpoint, Hybrid<Bfloat16>* learns) {
  const std::string file = checkpoint.file->path().string();
  for (std::size_t l = 0; l < converted_at_.size(); ++l) {
    const models::Mlp& mlp = checkpoint.layers[l].mlp;
    if (std::holds_alternative<models::DenseMlp>(mlp)) continue;
    require<InputError>(learns_, "{}: layer {}: expected a dense one", file, l);
    converted_at_[l] = converted_.size();
    CudaConverted& own = converted_.emplace_back();
    own.host = &learns->converted()[converted_.size() - 1];
  }
}

std::int64_t CudaHybrid::first_converted() const {
  const auto at = std::find_if(converted_at_.begin(), converted_at_.end(),
                               [](const auto& converted) { return converted.has_value(); });
  return at - converted_at_.begin();
}

void CudaHybrid::take_memory() {
  const models::ModelConfig& c = config_;
  const bool tapes = !recompute_;
  tapes_.resize(tapes ? converted_at_.size() : 0);
  inputs_.resize(converted_at_.size());
  arena_ = DeviceParts::divide([&](DeviceParts& take) {
    take(counts_, 3 * std::ssize(converted_));
    take(auxiliary_, std::ssize(converted_));
    for (std::size_t l = 0; l < converted_at_.size(); ++l) {
      if (static_cast<std::int64_t>(l) < first_converted()) continue;
      take(inputs_[l], s_.rows * c.d_model);
      const CudaConverted* moe = moe_of(l);
      if (tapes) {
        tapes_[l].walk(take, c, moe == nullptr ? MoeShape() : moe->host->moe()->layer.shape(),
                       s_.rows);
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

CudaMlp CudaHybrid::mlp_of(std::size_t layer, bool counts) const {
  if (!converted_at_[layer]) return frozen_.dense_mlp(layer);
  const CudaConverted& own = converted_[*converted_at_[layer]];
  const SelfRoutedShape& shape = own.host->self_routed()->layer.shape();
  return {
      .phi = shape.phi,
      .w = {own.tensors[0].operand, own.tensors[1].operand, own.tensors[2].operand},
      .self_routed = true,
      .up_by_input = shape.up_by_input,
      .threshold = {own.threshold_of(kInput), own.threshold_of(kGate), own.threshold_of(kHidden)},
      .counts = counts ? own.counts.data() : nullptr};
}

CudaConverted* CudaHybrid::moe_of(std::size_t layer) {
  if (!converted_at_[layer]) return nullptr;
  CudaConverted& own = converted_[*converted_at_[layer]];
  return own.host->moe() != nullptr ? &own : nullptr;
}

void CudaHybrid::run_layer(std::size_t layer, CudaTape& tape, std::int64_t rows, bool counts) {
  const Matrix r = stream(rows);
  frozen_.attention(layer, tape, r);
  cuda::copy(r.data, rows * config_.d_model, tape.r_mid.data(), stream_);
  const CudaConverted* moe = moe_of(layer);
  if (moe == nullptr) {
    frozen_.mlp(layer, mlp_of(layer, counts), tape, r);
    return;
  }
  frozen_.mlp_input(layer, r, view(s_.x, rows, config_.d_model));
  const bool normed = !frozen_.layer(layer).post_mlp_norm.empty();
  const Matrix y = normed ? view(tape.mlp_out, rows, config_.d_model) : r;
  moe_forward(*moe, tape, y, !normed);
  if (normed) frozen_.add_mlp_output(layer, y, r);
}

// The stream before each layer from the first converted one on is kept where wanted.
void CudaHybrid::run_layers(std::int64_t rows, bool keep) {
  for (std::size_t l = 0; l < converted_at_.size(); ++l) {
    if (keep && !inputs_[l].empty()) {
      cuda::copy(s_.r.data(), rows * config_.d_model, inputs_[l].data(), stream_);
    }
    run_layer(l, keep ? tape(l) : s_.tape, rows, true);
  }
}

void CudaHybrid::hidden(std::span<const std::int32_t> tokens, std::uint16_t* out) {
  const Matrix r = stream(std::ssize(tokens));
  frozen_.embed(tokens, r);
  run_layers(r.rows, false);
  frozen_.hidden(r, out);
}

// The divergence of the stream r; with `back`, dr is its gradient in r.
void CudaHybrid::head(std::int64_t rows, const std::uint16_t* teacher, double unit, bool back,
                      double* kl) {
  const std::int64_t d = config_.d_model;
  const Matrix r = stream(rows), dr = back ? view(s_.dr, rows, d) : Matrix();
  frozen_.hidden(r, s_.hidden.data());
  frozen_.divergence({teacher, rows, d}, {s_.hidden.data(), rows, d}, unit, dr, kl);
  if (back) {
    cuda::rms_norm_backward(r, frozen_.output_norm().data(), config_.norm_eps, dr, false, dr,
                            stream_);
  }
}

void CudaHybrid::divergence(std::span<const std::int32_t> tokens, const std::uint16_t* teacher,
                            double* kl) {
  const auto rows = static_cast<std::int64_t>(tokens.size());
  frozen_.embed(tokens, stream(rows));
  run_layers(rows, false);
  head(rows, teacher, 1, false, kl);
}

void CudaHybrid::gradients(std::span<const std::int32_t> tokens, const std::uint16_t* teacher,
                           std::int64_t n_step, double* kl) {
  const auto rows = static_cast<std::int64_t>(tokens.size());
  frozen_.embed(tokens, stream(rows));
  run_layers(rows, true);
  head(rows, teacher, 1 / static_cast<double>(n_step), true, kl);
  const std::int64_t first = first_converted();
  for (std::int64_t l = std::ssize(converted_at_) - 1; l >= first; --l) {
    const auto index = static_cast<std::size_t>(l);
    CudaTape& own = tape(index);
    const ConstMatrix input(inputs_[index].data(), rows, config_.d_model);
    if (recompute_) {
      cuda::copy(input.data, rows * config_.d_model, s_.r.data(), stream_);
      run_layer(index, own, rows, false);
    }
    // Nothing below the first converted layer's MLP wants a gradient.
    mlp_backward(index, own, rows, n_step, l > first);
    if (l > first) attention_backward(index, own, input, rows);
  }
}

}  // namespace moesaic::converter
