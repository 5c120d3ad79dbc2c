#include "tests/reference/decoder.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace moesaic::reference {
namespace {

using Vector = std::vector<double>;

Vector times(const Vector& w, const Vector& x, std::size_t rows) {
  Vector y(rows, 0.0);
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t c = 0; c < x.size(); ++c) y[r] += w[r * x.size() + c] * x[c];
  }
  return y;
}

// Every run of weight.size() elements normed on its own.
Vector normed(const Vector& x, const Vector& weight, double eps) {
  Vector y(x.size());
  const std::size_t d = weight.size();
  for (std::size_t begin = 0; begin < x.size(); begin += d) {
    double squares = 0;
    for (std::size_t i = 0; i < d; ++i) squares += x[begin + i] * x[begin + i];
    const double scale = 1 / std::sqrt(squares / static_cast<double>(d) + eps);
    for (std::size_t i = 0; i < d; ++i) y[begin + i] = x[begin + i] * scale * weight[i];
  }
  return y;
}

void rotate(Vector& x, std::size_t head_dim, double position, double base, bool interleaved) {
  for (std::size_t begin = 0; begin < x.size(); begin += head_dim) {
    for (std::size_t i = 0; i < head_dim / 2; ++i) {
      const double angle =
          position * std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
      double& a = x[begin + (interleaved ? 2 * i : i)];
      double& b = x[begin + (interleaved ? 2 * i + 1 : i + head_dim / 2)];
      const double rotated = a * std::cos(angle) - b * std::sin(angle);
      b = a * std::sin(angle) + b * std::cos(angle);
      a = rotated;
    }
  }
}

double dot(const double* a, const double* b, std::size_t n) {
  return std::inner_product(a, a + n, b, 0.0);
}

double activate(bool gelu, double x) {
  if (!gelu) return x / (1 + std::exp(-x));
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
}

void add_to(Vector& r, const Vector& y) {
  for (std::size_t i = 0; i < r.size(); ++i) r[i] += y[i];
}

}  // namespace

std::vector<double> Decoder::mlp(const Layer& layer, const Vector& x,
                                 std::vector<std::int32_t>* selected) const {
  const auto d = static_cast<std::size_t>(d_model);
  if (!layer.moe) {
    Vector h = times(layer.w_gate, x, static_cast<std::size_t>(d_ff));
    const Vector up = times(layer.w_up, x, static_cast<std::size_t>(d_ff));
    for (std::size_t i = 0; i < h.size(); ++i) h[i] = activate(gelu, h[i]) * up[i];
    return times(layer.w_down, h, d);
  }
  const Moe& moe = *layer.moe;
  Vector y = moe.bias;
  const auto add_neuron = [&](const double* rows, double mean) {
    const double f = activate(gelu, dot(rows, x.data(), d)) * dot(rows + d, x.data(), d) - mean;
    for (std::size_t i = 0; i < d; ++i) y[i] += f * rows[2 * d + i];
  };
  for (std::size_t i = 0; i < moe.shared.size(); i += 3 * d) add_neuron(&moe.shared[i], 0);

  const std::size_t n_experts = moe.mean.size();
  const Vector low = times(moe.router_v, x, moe.router_v.size() / d);
  Vector scores = times(moe.router_u, low, n_experts);
  add_to(scores, moe.router_bias);
  std::vector<std::int32_t> ids(n_experts);
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](std::int32_t a, std::int32_t b) {
    return scores[static_cast<std::size_t>(a)] > scores[static_cast<std::size_t>(b)];
  });
  ids.resize(static_cast<std::size_t>(moe.n_active));
  std::sort(ids.begin(), ids.end());
  for (const std::int32_t id : ids) {
    const auto i = static_cast<std::size_t>(id);
    add_neuron(&moe.experts[3 * d * i], moe.mean[i]);
  }
  if (!moe.bypass_q.empty()) {
    add_to(y, times(moe.bypass_p, times(moe.bypass_q, x, moe.bypass_q.size() / d), d));
  }
  if (selected != nullptr) selected->insert(selected->end(), ids.begin(), ids.end());
  return y;
}

std::vector<std::vector<double>> Decoder::logits(const std::vector<std::int32_t>& ids) const {
  const auto d = static_cast<std::size_t>(d_model);
  const auto hd = static_cast<std::size_t>(head_dim);
  const auto q_rows = static_cast<std::size_t>(n_heads) * hd;
  const auto kv_rows = static_cast<std::size_t>(n_kv_heads) * hd;
  std::vector<Vector> r;
  for (const std::int32_t id : ids) {
    Vector row(d);
    for (std::size_t i = 0; i < d; ++i) {
      row[i] = embedding_scale * embedding[static_cast<std::size_t>(id) * d + i];
    }
    r.push_back(row);
  }
  for (const Layer& layer : layers) {
    std::vector<Vector> q, k, v;
    for (std::size_t t = 0; t < r.size(); ++t) {
      const Vector n = normed(r[t], layer.attn_norm, norm_eps);
      q.push_back(times(layer.w_q, n, q_rows));
      k.push_back(times(layer.w_k, n, kv_rows));
      v.push_back(times(layer.w_v, n, kv_rows));
      if (!layer.q_norm.empty()) q[t] = normed(q[t], layer.q_norm, norm_eps);
      if (!layer.k_norm.empty()) k[t] = normed(k[t], layer.k_norm, norm_eps);
      rotate(q[t], hd, static_cast<double>(t), layer.rope_base, interleaved_rope);
      rotate(k[t], hd, static_cast<double>(t), layer.rope_base, interleaved_rope);
    }
    for (std::size_t t = 0; t < r.size(); ++t) {
      const auto window = static_cast<std::size_t>(layer.window);
      const std::size_t first = window == 0 || t + 1 < window ? 0 : t + 1 - window;
      Vector mixed(q_rows, 0.0);
      for (std::size_t h = 0; h < static_cast<std::size_t>(n_heads); ++h) {
        const std::size_t g = h / static_cast<std::size_t>(n_heads / n_kv_heads);
        Vector weights;
        for (std::size_t p = first; p <= t; ++p) {
          weights.push_back(attention_scale * dot(&q[t][h * hd], &k[p][g * hd], hd));
        }
        const double max = *std::max_element(weights.begin(), weights.end());
        double sum = 0;
        for (double& w : weights) sum += w = std::exp(w - max);
        for (std::size_t p = first; p <= t; ++p) {
          for (std::size_t i = 0; i < hd; ++i) {
            mixed[h * hd + i] += weights[p - first] / sum * v[p][g * hd + i];
          }
        }
      }
      Vector y = times(layer.w_o, mixed, d);
      if (!layer.post_attn_norm.empty()) y = normed(y, layer.post_attn_norm, norm_eps);
      add_to(r[t], y);
    }
    for (Vector& row : r) {
      Vector y = mlp(layer, normed(row, layer.mlp_norm, norm_eps));
      if (!layer.post_mlp_norm.empty()) y = normed(y, layer.post_mlp_norm, norm_eps);
      add_to(row, y);
    }
  }
  std::vector<Vector> result;
  for (const Vector& row : r) {
    result.push_back(
        times(head, normed(row, output_norm, norm_eps), static_cast<std::size_t>(vocab_size)));
  }
  return result;
}

}  // namespace moesaic::reference
