#pragma once

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "kernels/mixture.h"
#include "tests/kernels/packed.h"
#include "tests/kernels/support.h"
#include "tests/reference/mixture.h"

namespace moesaic::kernels {

struct MixtureOptions {
  MixtureKind kind;
  DType experts = DType::Q8_0;
  DType router = DType::Q8_0;
  std::int64_t d_model = 96;
  std::int64_t n_shared = 5;
  std::int64_t n_experts = 36;
  std::int64_t block = 1;
  std::int64_t n_active = 7;
  std::int64_t router_rank = 32;
  std::int64_t bypass_rank = 32;
  bool means = true;
};

/// A random layer that owns its weights.
struct MixtureLayer {
  explicit MixtureLayer(const MixtureOptions& o) {
    const std::int64_t c = rows_per_neuron(o.kind.expert);
    const bool biased = o.kind.expert == ExpertKind::Gelu;
    const std::int64_t n_neurons = o.n_experts * o.block;
    shared = Packed(o.experts, c * o.n_shared, o.d_model, 1, 0.2f);
    experts = Packed(o.experts, c * n_neurons, o.d_model, 2, 0.2f);
    std::int64_t n_scores = o.n_experts;
    if (o.kind.router == RouterKind::ProductKey) {
      n_scores = 2 * std::llround(std::sqrt(static_cast<double>(o.n_experts)));
    }
    if (o.n_experts > 0) {
      const std::int64_t rank = o.kind.router == RouterKind::FullRank ? o.d_model : o.router_rank;
      if (o.kind.router != RouterKind::FullRank) {
        router_v = Packed(o.router, o.kind.router == RouterKind::ProductKey ? 2 * rank : rank,
                          o.d_model, 3, 0.1f);
      }
      router_u = Packed(o.router, n_scores, rank, 4, 0.2f);
    }
    shared_bias = normal_values(biased ? size(o.n_shared) : 0, 10);
    expert_bias = normal_values(biased ? size(n_neurons) : 0, 11);
    if (o.means) mean = normal_values(size(n_neurons), 5, 0.1f);
    router_bias = normal_values(size(n_scores), 6);
    bias = normal_values(size(o.d_model), 9);
    if (o.bypass_rank > 0) {
      bypass_q = Packed(o.router, o.bypass_rank, o.d_model, 7, 0.1f);
      bypass_p = Packed(o.router, o.d_model, o.bypass_rank, 8);
    }
    view = {.kind = o.kind,
            .phi = Activation::Silu,
            .block = o.block,
            .n_active = o.n_active,
            .shared = shared.view(),
            .experts = experts.view(),
            .shared_bias = shared_bias,
            .expert_bias = expert_bias,
            .expert_mean = mean,
            .router_v = router_v.view(),
            .router_u = router_u.view(),
            .router_bias = router_bias,
            .bypass_q = bypass_q.view(),
            .bypass_p = bypass_p.view(),
            .bias = bias};
  }
  MixtureLayer(const MixtureLayer&) = delete;
  MixtureLayer& operator=(const MixtureLayer&) = delete;

  Packed shared, experts, router_v, router_u, bypass_q, bypass_p;
  std::vector<float> shared_bias, expert_bias, mean, router_bias, bias;
  MixtureView view;
};

struct MixtureResult {
  std::vector<float> y;
  std::vector<std::int32_t> ids;
  std::vector<float> gates = {};
};

inline MixtureResult run(Lender& lender, const MixtureView& layer, const std::vector<float>& x) {
  const std::int64_t n = static_cast<std::int64_t>(x.size()) / layer.d_model();
  MixtureResult r{std::vector<float>(x.size()), std::vector<std::int32_t>(size(n * layer.n_active)),
                  std::vector<float>(size(n * layer.n_active))};
  mixture(lender.ctx, layer, ConstMatrix(x.data(), n, layer.d_model()),
          Matrix(r.y.data(), n, layer.d_model()), r.ids, r.gates);
  return r;
}

/// The selection is the reference's but for scores that differ by rounding; the output is that of
/// the selection made.
inline void expect_layer(const MixtureView& layer, const std::vector<float>& x,
                         const MixtureResult& found, double relative_error = 16 * kEps) {
  const std::int64_t n = static_cast<std::int64_t>(x.size()) / layer.d_model();
  const reference::Mixture expected =
      reference::mixture(layer, ConstMatrix(x.data(), n, layer.d_model()), found.ids);
  const std::size_t k = size(layer.n_active);
  for (std::size_t t = 0; t < size(n); ++t) {
    const std::size_t row = t * size(layer.n_experts());
    const auto ids = std::span(found.ids).subspan(t * k, k);
    const std::set<std::int32_t> own(ids.begin(), ids.end());
    ASSERT_EQ(own.size(), k);
    ASSERT_TRUE(std::is_sorted(ids.begin(), ids.end()));
    double lowest = HUGE_VAL;
    for (const std::int32_t id : own) {
      const std::size_t i = row + size(id);
      lowest = std::min(lowest, expected.scores[i] + relative_error * expected.score_magnitude[i]);
    }
    for (std::int32_t e = 0; e < layer.n_experts(); ++e) {
      if (own.contains(e)) continue;
      const std::size_t i = row + size(e);
      ASSERT_LE(expected.scores[i], lowest + relative_error * expected.score_magnitude[i])
          << "expert " << e << " is left out";
    }
  }
  for (std::size_t i = 0; i < found.gates.size(); ++i) {
    ASSERT_NEAR(found.gates[i], expected.gates[i],
                relative_error * expected.gate_magnitude[i] + 1e-30)
        << "gate " << i;
  }
  for (std::size_t i = 0; i < found.y.size(); ++i) {
    ASSERT_NEAR(found.y[i], expected.y[i], relative_error * expected.magnitude[i] + 1e-30)
        << "element " << i;
  }
}

}  // namespace moesaic::kernels
