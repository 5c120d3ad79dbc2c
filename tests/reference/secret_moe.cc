#include "tests/reference/secret_moe.h"

#include <cmath>
#include <set>
#include <span>

#include "tests/reference/linear.h"
#include "tests/reference/ops.h"

namespace moesaic::reference {
namespace {

// Values with the sums of their terms' absolute values.
struct Sums {
  std::vector<double> value;
  std::vector<double> magnitude;
};

Sums times(const WeightView& w, const Sums& x) {
  const std::vector<float> weights = unpack(w);
  Sums y{std::vector<double>(static_cast<std::size_t>(w.rows)),
         std::vector<double>(static_cast<std::size_t>(w.rows))};
  const std::size_t n = x.value.size();
  for (std::size_t r = 0; r < y.value.size(); ++r) {
    for (std::size_t i = 0; i < n; ++i) {
      const double weight = weights[r * n + i];
      y.value[r] += weight * x.value[i];
      y.magnitude[r] += std::fabs(weight) * x.magnitude[i];
    }
  }
  return y;
}

void add(Sums& to, const Sums& terms) {
  for (std::size_t i = 0; i < to.value.size(); ++i) {
    to.value[i] += terms.value[i];
    to.magnitude[i] += terms.magnitude[i];
  }
}

Sums exactly(std::span<const float> values) {
  Sums s;
  for (const float v : values) {
    s.value.push_back(v);
    s.magnitude.push_back(std::fabs(v));
  }
  return s;
}

// h · w_down of one neuron.
Sums neuron(const kernels::SecretMoeView& layer, const WeightView& rows, std::int64_t i,
            double mean, const Sums& x) {
  const Sums in = times(rows.slice(3 * i, 2), x);
  const double phi = activate(layer.phi, in.value[0]);
  const double h = phi * in.value[1] - mean;
  // |φ'| <= 1.13 for both activations.
  const double h_magnitude = std::fabs(phi) * in.magnitude[1] +
                             1.13 * in.magnitude[0] * std::fabs(in.value[1]) + std::fabs(mean);
  Sums y = exactly(unpack(rows.slice(3 * i + 2, 1)));
  for (double& v : y.value) v *= h;
  for (double& v : y.magnitude) v *= h_magnitude;
  return y;
}

}  // namespace

SecretMoe secret_moe(const kernels::SecretMoeView& layer, ConstMatrix x,
                     const std::vector<std::int32_t>& selected) {
  const auto d_model = static_cast<std::size_t>(layer.d_model());
  const auto k = static_cast<std::size_t>(layer.n_active);
  SecretMoe out;
  for (std::size_t t = 0; t < static_cast<std::size_t>(x.rows); ++t) {
    const Sums x_t = exactly({x.row(static_cast<std::int64_t>(t)), d_model});
    Sums scores = times(layer.router_u, times(layer.router_v, x_t));
    add(scores, exactly(layer.router_bias));
    Sums y = exactly(layer.bias);
    for (std::int64_t i = 0; i < layer.n_shared(); ++i) {
      add(y, neuron(layer, layer.shared, i, 0, x_t));
    }
    for (std::size_t j = t * k; j < (t + 1) * k; ++j) {
      const std::int32_t i = selected[j];
      add(y, neuron(layer, layer.experts, i, layer.expert_mean[static_cast<std::size_t>(i)], x_t));
    }
    if (!layer.bypass_p.empty()) add(y, times(layer.bypass_p, times(layer.bypass_q, x_t)));
    const auto append = [](std::vector<double>& to, const std::vector<double>& from) {
      to.insert(to.end(), from.begin(), from.end());
    };
    append(out.scores, scores.value);
    append(out.score_magnitude, scores.magnitude);
    append(out.y, y.value);
    append(out.magnitude, y.magnitude);
  }
  return out;
}

MoeBytes gather_bytes(const kernels::SecretMoeView& layer, std::int64_t n_tokens) {
  return {n_tokens * (layer.router_v.bytes() + layer.router_u.bytes() + layer.bypass_q.bytes() +
                      layer.bypass_p.bytes()),
          n_tokens * (layer.shared.bytes() + 3 * layer.n_active * layer.experts.row_bytes())};
}

MoeBytes grouped_bytes(const kernels::SecretMoeView& layer, const std::vector<std::int32_t>& ids) {
  const std::set<std::int32_t> distinct(ids.begin(), ids.end());
  return {layer.router_v.bytes() + layer.router_u.bytes() + layer.bypass_q.bytes() +
              layer.bypass_p.bytes(),
          layer.shared.bytes() +
              3 * static_cast<std::int64_t>(distinct.size()) * layer.experts.row_bytes()};
}

}  // namespace moesaic::reference
