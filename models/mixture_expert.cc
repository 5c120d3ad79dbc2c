#include "models/mixture_expert.h"

#include <cmath>
#include <numeric>
#include <span>

#include "kernels/activation.h"
#include "kernels/quant.h"

namespace moesaic::models {

MixtureExpert::MixtureExpert(const kernels::MixtureView& layer, std::int64_t expert)
    : kind_(layer.kind),
      phi_(layer.kind.expert == kernels::ExpertKind::Glu ? layer.phi
                                                         : kernels::Activation::GeluTanh),
      block_(static_cast<std::size_t>(layer.block)),
      d_model_(static_cast<std::size_t>(layer.d_model())),
      bias_(block_),
      mean_(block_) {
  const std::int64_t n_rows = kernels::rows_per_neuron(kind_.expert) * layer.block;
  rows_.resize(static_cast<std::size_t>(n_rows) * d_model_);
  for (std::int64_t r = 0; r < n_rows; ++r) {
    kernels::dequantize_row(
        layer.experts.dtype, layer.experts.row(expert * n_rows + r),
        std::span(rows_).subspan(static_cast<std::size_t>(r) * d_model_, d_model_));
  }
  const std::size_t first = static_cast<std::size_t>(expert) * block_;
  for (std::size_t i = 0; i < block_; ++i) {
    if (!layer.expert_bias.empty()) bias_[i] = layer.expert_bias[first + i];
    if (!layer.expert_mean.empty()) mean_[i] = layer.expert_mean[first + i];
  }
}

double MixtureExpert::length(const float* x) const {
  const auto row = [&](std::size_t part, std::size_t i) {
    return rows_.data() + (part * block_ + i) * d_model_;
  };
  const auto dot = [&](const float* w) { return std::inner_product(w, w + d_model_, x, 0.0); };
  const bool glu = kind_.expert == kernels::ExpertKind::Glu;
  std::vector<double> sum(d_model_);
  for (std::size_t i = 0; i < block_; ++i) {
    double h = dot(row(0, i)) + bias_[i];
    if (kind_.expert != kernels::ExpertKind::Linear) {
      h = kernels::activate(phi_, static_cast<float>(h));
    }
    if (glu) h *= dot(row(1, i));
    h -= mean_[i];
    const float* out = row(glu ? 2 : 1, i);
    for (std::size_t j = 0; j < d_model_; ++j) sum[j] += h * out[j];
  }
  return std::sqrt(std::inner_product(sum.begin(), sum.end(), sum.begin(), 0.0));
}

}  // namespace moesaic::models
