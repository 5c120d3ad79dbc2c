#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "kernels/secret_moe.h"
#include "tests/kernels/packed.h"
#include "tests/kernels/support.h"
#include "tests/reference/secret_moe.h"

namespace moesaic::kernels {

struct MoeOptions {
  DType experts = DType::Q4_1;
  DType router = DType::Q8_0;
  std::int64_t d_model = 96;
  std::int64_t n_shared = 5;
  std::int64_t n_experts = 40;
  std::int64_t n_active = 11;
  std::int64_t router_rank = 32;
  std::int64_t bypass_rank = 32;
};

/// A random layer that owns its weights.
struct MoeLayer {
  explicit MoeLayer(const MoeOptions& o)
      : shared(o.experts, 3 * o.n_shared, o.d_model, 1, 0.2f),
        experts(o.experts, 3 * o.n_experts, o.d_model, 2, 0.2f),
        router_v(o.router, o.n_experts == 0 ? 0 : o.router_rank, o.d_model, 3, 0.1f),
        router_u(o.router, o.n_experts, o.n_experts == 0 ? 0 : o.router_rank, 4),
        mean(normal_values(size(o.n_experts), 5, 0.1f)),
        router_bias(normal_values(size(o.n_experts), 6)),
        bias(normal_values(size(o.d_model), 9)) {
    if (o.bypass_rank > 0) {
      bypass_q = Packed(o.router, o.bypass_rank, o.d_model, 7, 0.1f);
      bypass_p = Packed(o.router, o.d_model, o.bypass_rank, 8);
    }
    view = {.n_active = o.n_active,
            .shared = shared.view(),
            .experts = experts.view(),
            .expert_mean = mean,
            .router_v = router_v.view(),
            .router_u = router_u.view(),
            .router_bias = router_bias,
            .bypass_q = bypass_q.view(),
            .bypass_p = bypass_p.view(),
            .bias = bias};
  }
  MoeLayer(const MoeLayer&) = delete;
  MoeLayer& operator=(const MoeLayer&) = delete;

  Packed shared, experts, router_v, router_u, bypass_q, bypass_p;
  std::vector<float> mean, router_bias, bias;
  SecretMoeView view;
};

struct MoeResult {
  std::vector<float> y;
  std::vector<std::int32_t> ids;
};

inline MoeResult run(Lender& lender, const SecretMoeView& layer, const std::vector<float>& x,
                     MoePath path) {
  const std::int64_t n = static_cast<std::int64_t>(x.size()) / layer.d_model();
  MoeResult r{std::vector<float>(x.size()), std::vector<std::int32_t>(size(n * layer.n_active))};
  secret_moe(lender.ctx, layer, ConstMatrix(x.data(), n, layer.d_model()),
             Matrix(r.y.data(), n, layer.d_model()), path, r.ids);
  return r;
}

/// The selection is the reference's but for scores that differ by rounding; the output is that of
/// the selection made.
inline void expect_layer(const SecretMoeView& layer, const std::vector<float>& x,
                         const MoeResult& found, double relative_error = 16 * kEps) {
  const std::int64_t n = static_cast<std::int64_t>(x.size()) / layer.d_model();
  const ConstMatrix x_rows(x.data(), n, layer.d_model());
  const reference::SecretMoe expected = reference::secret_moe(layer, x_rows, found.ids);
  const std::size_t k = size(layer.n_active);
  for (std::size_t t = 0; t < size(n); ++t) {
    const std::size_t row = t * size(layer.n_experts());
    const std::set<std::int32_t> own(found.ids.begin() + static_cast<std::ptrdiff_t>(t * k),
                                     found.ids.begin() + static_cast<std::ptrdiff_t>((t + 1) * k));
    ASSERT_EQ(own.size(), k);
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
  for (std::size_t i = 0; i < found.y.size(); ++i) {
    ASSERT_NEAR(found.y[i], expected.y[i], relative_error * expected.magnitude[i] + 1e-30)
        << "element " << i;
  }
}

}  // namespace moesaic::kernels
