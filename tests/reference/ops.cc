#include "tests/reference/ops.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <numeric>

namespace moesaic::reference {

std::vector<double> rms_norm(ConstMatrix x, std::span<const float> weight, double eps) {
  std::vector<double> y;
  for (std::int64_t r = 0; r < x.rows; ++r) {
    double sum = 0;
    for (std::int64_t i = 0; i < x.cols; ++i) sum += double{x.row(r)[i]} * x.row(r)[i];
    const double root = std::sqrt(sum / static_cast<double>(x.cols) + eps);
    for (std::int64_t i = 0; i < x.cols; ++i) {
      y.push_back(x.row(r)[i] / root * weight[static_cast<std::size_t>(i)]);
    }
  }
  return y;
}

std::vector<double> rope(ConstMatrix x, int head_dim, std::span<const std::int32_t> positions,
                         std::span<const float> freq, kernels::RopeStyle style) {
  std::vector<double> y(static_cast<std::size_t>(x.rows * x.cols));
  for (std::int64_t r = 0; r < x.rows; ++r) {
    for (std::int64_t head = 0; head < x.cols; head += head_dim) {
      for (int i = 0; i < head_dim / 2; ++i) {
        const bool interleaved = style == kernels::RopeStyle::Interleaved;
        const std::int64_t first = head + (interleaved ? 2 * i : i);
        const std::int64_t second = interleaved ? first + 1 : first + head_dim / 2;
        const float angle = static_cast<float>(positions[static_cast<std::size_t>(r)]) *
                            freq[static_cast<std::size_t>(i)];
        const double c = std::cos(double{angle});
        const double s = std::sin(double{angle});
        const double a = x.row(r)[first];
        const double b = x.row(r)[second];
        y[static_cast<std::size_t>(r * x.cols + first)] = a * c - b * s;
        y[static_cast<std::size_t>(r * x.cols + second)] = a * s + b * c;
      }
    }
  }
  return y;
}

double activate(kernels::Activation phi, double x) {
  if (phi == kernels::Activation::Silu) return x / (1 + std::exp(-x));
  const double u = std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x);
  // ½(1 + tanh u), written so that it keeps its digits for negative u.
  return x / (1 + std::exp(-2 * u));
}

std::vector<double> attention(ConstMatrix q, const kernels::TokenPlaces& places,
                              const kernels::KvLayerView& cache, int n_heads, double scale,
                              std::int64_t window) {
  const int dim = cache.head_dim;
  std::vector<double> out(static_cast<std::size_t>(q.rows * n_heads * dim));
  std::vector<double> p;
  for (std::int64_t t = 0; t < q.rows; ++t) {
    const std::int64_t position = places.positions[static_cast<std::size_t>(t)];
    const std::int64_t begin = window == 0 ? 0 : std::max<std::int64_t>(0, position - window + 1);
    for (int h = 0; h < n_heads; ++h) {
      const int kv_head = h / (n_heads / cache.n_kv_heads);
      const auto at = [&](std::int64_t key) {
        return ((places.slots[static_cast<std::size_t>(t)] * cache.capacity + key) *
                    cache.n_kv_heads +
                kv_head) *
               dim;
      };
      const float* query = q.row(t) + std::int64_t{h} * dim;
      double maximum = -std::numeric_limits<double>::infinity();
      p.clear();
      for (std::int64_t key = begin; key <= position; ++key) {
        double score = 0;
        for (int i = 0; i < dim; ++i) score += double{query[i]} * cache.keys[at(key) + i];
        p.push_back(score * scale);
        maximum = std::max(maximum, p.back());
      }
      double sum = 0;
      for (double& value : p) sum += value = std::exp(value - maximum);
      for (std::int64_t key = begin; key <= position; ++key) {
        const double weight = p[static_cast<std::size_t>(key - begin)] / sum;
        for (int i = 0; i < dim; ++i) {
          out[static_cast<std::size_t>((t * n_heads + h) * dim + i)] +=
              weight * cache.values[at(key) + i];
        }
      }
    }
  }
  return out;
}

std::vector<std::int32_t> top_k(std::span<const float> scores, std::size_t k) {
  const auto value = [&](std::int32_t i) {
    const float s = scores[static_cast<std::size_t>(i)];
    return std::isnan(s) ? -std::numeric_limits<float>::infinity() : s;
  };
  std::vector<std::int32_t> ids(scores.size());
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(),
                   [&](std::int32_t a, std::int32_t b) { return value(a) > value(b); });
  ids.resize(k);
  std::sort(ids.begin(), ids.end());
  return ids;
}

}  // namespace moesaic::reference
