#include "tests/reference/self_routed.h"

#include <algorithm>
#include <cmath>

#include "kernels/quant.h"
#include "tests/reference/linear.h"
#include "tests/reference/ops.h"

namespace moesaic::reference {
namespace {

struct Value {
  double value = 0;
  double error = 0;
};

double rounded(double v) {
  return kernels::bf16_to_f32(kernels::f32_to_bf16(static_cast<float>(v)));
}

void round_to_bf16(std::vector<float>& weights, std::vector<Value>& x) {
  for (float& w : weights) w = static_cast<float>(rounded(w));
  for (Value& v : x) {
    const double low = rounded(v.value - v.error), high = rounded(v.value + v.error);
    v.value = rounded(v.value);
    v.error = std::max(high - v.value, v.value - low);
  }
}

// W x for entries that have errors of their own.
std::vector<Value> times(const WeightView& w, std::vector<Value> x, const Precision& p) {
  std::vector<float> weights = unpack(w);
  if (p.bf16) round_to_bf16(weights, x);
  const std::size_t n = x.size();
  std::vector<double> largest((n + 31) / 32);
  for (std::size_t c = 0; c < n; ++c) {
    largest[c / 32] = std::max(largest[c / 32], std::fabs(x[c].value) + x[c].error);
  }
  std::vector<Value> y(static_cast<std::size_t>(w.rows));
  for (std::size_t r = 0; r < y.size(); ++r) {
    for (std::size_t c = 0; c < n; ++c) {
      const double weight = weights[r * n + c];
      const double size = std::fabs(x[c].value);
      y[r].value += weight * x[c].value;
      y[r].error +=
          std::fabs(weight) * (x[c].error + (p.element + p.sum) * size + p.unit * largest[c / 32]);
    }
  }
  return y;
}

}  // namespace

SelfRouted self_routed(const kernels::SelfRoutedView& layer, ConstMatrix x, const Precision& gate,
                       const Precision& up, const Precision& down) {
  const auto d_model = static_cast<std::size_t>(layer.d_model());
  const auto d_ff = static_cast<std::size_t>(layer.d_ff());
  SelfRouted result;
  for (std::int64_t t = 0; t < x.rows; ++t) {
    std::vector<Value> all(d_model), large(d_model);
    std::vector<std::int64_t> inputs, routed, kept;
    for (std::size_t j = 0; j < d_model; ++j) {
      all[j].value = x.row(t)[j];
      if (!(std::fabs(x.row(t)[j]) >= layer.input_threshold[j])) continue;
      large[j] = all[j];
      inputs.push_back(static_cast<std::int64_t>(j));
    }
    const std::vector<Value> g = times(layer.w_gate, large, gate);
    const std::vector<Value> u = times(layer.w_up, layer.up_by_input ? large : all, up);
    std::vector<Value> h(d_ff);
    for (std::size_t i = 0; i < d_ff; ++i) {
      // |φ'| <= 1.13 for both activations, and both are exact to a few float32 roundings.
      const double a = activate(layer.phi, g[i].value);
      const double a_error = 1.13 * g[i].error + 1e-6 * std::fabs(a) + 1e-7;
      const double product = a * u[i].value;
      const double error = std::fabs(a) * u[i].error + a_error * std::fabs(u[i].value) +
                           a_error * u[i].error + 1e-7 * std::fabs(product);
      const double gate_least = layer.up_by_input ? 0 : layer.gate_threshold[i];
      const double least = layer.hidden_threshold[i];
      const bool is_routed = std::fabs(a) >= gate_least;
      const bool is_kept = is_routed && std::fabs(product) >= least;
      // The thresholds 0 and infinity leave no doubt.
      const auto close = [](double size, double off, double threshold) {
        return threshold > 0 && std::isfinite(threshold) && std::fabs(size - threshold) <= off;
      };
      const bool doubtful = close(std::fabs(a), a_error, gate_least) ||
                            (is_routed && close(std::fabs(product), error, least));
      result.n_doubtful += doubtful;
      if (is_routed) routed.push_back(static_cast<std::int64_t>(i));
      if (is_kept) kept.push_back(static_cast<std::int64_t>(i));
      h[i] = {is_kept ? product : 0, is_kept ? error : 0};
      if (doubtful) h[i].error = std::fabs(product) + error;
    }
    for (const Value& v : times(layer.w_down, h, down)) {
      result.y.push_back(v.value);
      result.error.push_back(v.error);
    }
    result.inputs.push_back(std::move(inputs));
    result.routed.push_back(std::move(routed));
    result.kept.push_back(std::move(kept));
  }
  return result;
}

std::int64_t multiply_adds(const kernels::SelfRoutedView& layer, const SelfRouted& result) {
  std::int64_t sum = 0;
  for (std::size_t t = 0; t < result.inputs.size(); ++t) {
    const auto n_inputs = static_cast<std::int64_t>(result.inputs[t].size());
    const std::size_t n_up = layer.up_by_input ? 0 : result.routed[t].size();
    const auto rows = static_cast<std::int64_t>(n_up + result.kept[t].size());
    sum += n_inputs * layer.d_ff() * (layer.up_by_input ? 2 : 1) + rows * layer.d_model();
  }
  return sum;
}

}  // namespace moesaic::reference
