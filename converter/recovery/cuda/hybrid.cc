#include "converter/recovery/cuda/hybrid.h"

#include <algorithm>
#include <array>

#include "kernels/base/error.h"
#include "kernels/cuda/training/elementwise.h"

namespace moesaic::converter {

cuda::Threshold CudaSelfRouted::threshold_of(SelfRoutedVector which) const {
  if (threshold[which].empty()) return {};
  return {threshold[which].data(), host->layer.factors()[which]};
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
    require<InputError>(std::holds_alternative<kernels::SelfRoutedView>(mlp) && learns_,
                        "{}: layer {}: expected a dense or a self-routed one (glu+gate, "
                        "glu+input): others are trained on the CPU alone",
                        file, l);
    converted_at_[l] = converted_.size();
    TrainedSelfRouted<Bfloat16>* host = learns->converted()[converted_.size()].self_routed();
    converted_.emplace_back().host = host;
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
  const std::int64_t matrix = c.d_model * c.d_ff;
  arena_ = DeviceParts::divide([&](DeviceParts& take) {
    take(counts_, static_cast<std::int64_t>(3 * converted_.size()));
    for (std::size_t l = 0; l < converted_at_.size(); ++l) {
      if (static_cast<std::int64_t>(l) >= first_converted()) {
        take(inputs_[l], s_.rows * c.d_model);
        if (tapes) tapes_[l].walk(take, c, s_.rows);
      }
    }
    for (CudaSelfRouted& own : converted_) {
      for (std::size_t m = 0; m < 3; ++m) {
        take(own.value[m], matrix);
        take(own.gradient[m], matrix);
        take(own.operand[m], matrix);
      }
      const SelfRoutedThresholds<float>& given = own.host->layer.given();
      const std::array<const std::vector<float>*, 3> thresholds = {&given.input, &given.gate,
                                                                   &given.hidden};
      for (std::size_t v = 0; v < 3; ++v) {
        take(own.threshold[v], static_cast<std::int64_t>(thresholds[v]->size()));
      }
    }
  });
  for (std::size_t i = 0; i < converted_.size(); ++i) {
    converted_[i].counts = counts_.subspan(3 * i, 3);
  }
}

void CudaHybrid::put() {
  for (CudaSelfRouted& own : converted_) {
    const auto values = own.host->parameters->tensors();
    for (std::size_t m = 0; m < 3; ++m) {
      copy_in<float>(values[m], own.value[m], stream_);
      zero(own.gradient[m], stream_);
    }
    const SelfRoutedThresholds<float>& given = own.host->layer.given();
    copy_in<float>(given.input, own.threshold[kInput], stream_);
    copy_in<float>(given.gate, own.threshold[kGate], stream_);
    copy_in<float>(given.hidden, own.threshold[kHidden], stream_);
  }
  refresh();
}

void CudaHybrid::fetch() {
  for (CudaSelfRouted& own : converted_) {
    const auto values = own.host->parameters->tensors();
    for (std::size_t m = 0; m < 3; ++m) copy_out<float>(own.value[m], values[m], stream_);
  }
}

void CudaHybrid::refresh() {
  for (CudaSelfRouted& own : converted_) {
    for (std::size_t m = 0; m < 3; ++m) {
      cuda::to_bf16(own.value[m].data(), static_cast<std::int64_t>(own.value[m].size()),
                    own.operand[m].data(), stream_);
    }
  }
}

CudaTape& CudaHybrid::tape(std::size_t layer) {
  const bool own = !tapes_.empty() && static_cast<std::int64_t>(layer) >= first_converted();
  return own ? tapes_[layer] : s_.tape;
}

CudaMlp CudaHybrid::mlp_of(std::size_t layer, bool counts) const {
  if (!converted_at_[layer]) return frozen_.dense_mlp(layer);
  const CudaSelfRouted& own = converted_[*converted_at_[layer]];
  return {
      .phi = own.host->layer.shape().phi,
      .w = {own.operand[0], own.operand[1], own.operand[2]},
      .self_routed = true,
      .up_by_input = own.host->layer.shape().up_by_input,
      .threshold = {own.threshold_of(kInput), own.threshold_of(kGate), own.threshold_of(kHidden)},
      .counts = counts ? own.counts.data() : nullptr};
}

void CudaHybrid::run_layer(std::size_t layer, CudaTape& tape, std::int64_t rows, bool counts) {
  const Matrix r = stream(rows);
  frozen_.attention(layer, tape, r);
  cuda::copy(r.data, rows * config_.d_model, tape.r_mid.data(), stream_);
  frozen_.mlp(layer, mlp_of(layer, counts), tape, r);
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
    mlp_backward(index, own, rows, l > first);
    if (l > first) attention_backward(index, own, input, rows);
  }
}

}  // namespace moesaic::converter
