#include "tests/reference/mixture.h"

#include <algorithm>
#include <cmath>
#include <span>

#include "tests/reference/linear.h"
#include "tests/reference/ops.h"

namespace moesaic::reference {
namespace {

using kernels::ExpertKind;
using kernels::GateKind;
using kernels::RouterKind;

// A value with the sum of its terms' absolute values.
struct Sum {
  double value = 0;
  double magnitude = 0;

  void add(Sum term, double factor = 1) {
    value += factor * term.value;
    magnitude += std::fabs(factor) * term.magnitude;
  }
};
using Sums = std::vector<Sum>;

Sum exactly(double v) { return {v, std::fabs(v)}; }

Sum product(Sum a, Sum b) {
  return {a.value * b.value, a.magnitude * std::fabs(b.value) + std::fabs(a.value) * b.magnitude};
}

Sums exactly(std::span<const float> values) {
  Sums s;
  for (const float v : values) s.push_back(exactly(v));
  return s;
}

Sum dot(std::span<const float> w, std::span<const Sum> x) {
  Sum s;
  for (std::size_t i = 0; i < w.size(); ++i) s.add(x[i], w[i]);
  return s;
}

Sums times(const WeightView& w, std::span<const Sum> x) {
  const std::vector<float> weights = unpack(w);
  Sums y;
  for (std::int64_t r = 0; r < w.rows; ++r) {
    y.push_back(dot(std::span(weights).subspan(static_cast<std::size_t>(r * w.cols),
                                               static_cast<std::size_t>(w.cols)),
                    x));
  }
  return y;
}

std::vector<float> row(const WeightView& w, std::int64_t r) { return unpack(w.slice(r, 1)); }

// |φ'| <= 1.13 for both activations.
Sum activated(kernels::Activation phi, Sum s) {
  return {activate(phi, s.value), 1.13 * s.magnitude};
}

// factor · (f_i(x) − mean) w_out,i, added to y; `first` is the neuron's first row and `step` the
// way to its next.
void add_neuron(const kernels::MixtureView& layer, const WeightView& rows, std::int64_t first,
                std::int64_t step, double bias, double mean, Sum factor, const Sums& x, Sums& y) {
  Sum f = dot(row(rows, first), x);
  if (layer.kind.expert == ExpertKind::Glu) {
    f = product(activated(layer.phi, f), dot(row(rows, first + step), x));
  } else if (layer.kind.expert == ExpertKind::Gelu) {
    f.add(exactly(bias));
    f = activated(kernels::Activation::GeluTanh, f);
  }
  f.add(exactly(-mean));
  const Sum h = product(factor, f);
  const std::vector<float> out =
      row(rows, first + step * (layer.kind.expert == ExpertKind::Glu ? 2 : 1));
  for (std::size_t j = 0; j < y.size(); ++j) y[j].add(h, out[j]);
}

// One score per expert, whatever the router.
Sums scores_of(const kernels::MixtureView& layer, const Sums& x) {
  const std::int64_t n_experts = layer.n_experts();
  if (n_experts == 0) return {};
  if (layer.kind.router != RouterKind::ProductKey) {
    Sums scores = layer.kind.router == RouterKind::FullRank
                      ? times(layer.router_u, x)
                      : times(layer.router_u, times(layer.router_v, x));
    for (std::size_t e = 0; e < scores.size(); ++e) scores[e].add(exactly(layer.router_bias[e]));
    return scores;
  }
  const Sums z = times(layer.router_v, x);
  const std::size_t rank = z.size() / 2;
  const auto m = static_cast<std::size_t>(layer.router_u.rows / 2);
  Sums keys;
  for (std::size_t i = 0; i < 2 * m; ++i) {
    keys.push_back(dot(row(layer.router_u, static_cast<std::int64_t>(i)),
                       std::span(z).subspan(i < m ? 0 : rank, rank)));
    keys.back().add(exactly(layer.router_bias[i]));
  }
  Sums scores;
  for (std::size_t a = 0; a < m; ++a) {
    for (std::size_t b = 0; b < m; ++b) {
      Sum s = keys[a];
      s.add(keys[m + b]);
      scores.push_back(s);
    }
  }
  return scores;
}

Sums gates_of(const kernels::MixtureView& layer, const Sums& scores,
              std::span<const std::int32_t> ids) {
  Sums gates;
  double most = -HUGE_VAL, sum = 0;
  for (const std::int32_t id : ids)
    most = std::max(most, scores[static_cast<std::size_t>(id)].value);
  for (const std::int32_t id : ids) {
    sum += std::exp(scores[static_cast<std::size_t>(id)].value - most);
  }
  double largest_error = 0;
  for (const std::int32_t id : ids) {
    largest_error = std::max(largest_error, scores[static_cast<std::size_t>(id)].magnitude);
  }
  for (const std::int32_t id : ids) {
    const Sum s = scores[static_cast<std::size_t>(id)];
    if (layer.kind.gate == GateKind::None) {
      gates.push_back(exactly(1));
    } else if (layer.kind.gate == GateKind::Score) {
      gates.push_back(s);
    } else {
      // dg_i = g_i (ds_i − Σ g_j ds_j); a few roundings of its own.
      const double g = std::exp(s.value - most) / sum;
      gates.push_back({g, g * (2 * largest_error + 2)});
    }
  }
  return gates;
}

}  // namespace

Mixture mixture(const kernels::MixtureView& layer, ConstMatrix x,
                const std::vector<std::int32_t>& selected) {
  const auto d_model = static_cast<std::size_t>(layer.d_model());
  const auto k = static_cast<std::size_t>(layer.n_active);
  const std::int64_t n_rows = layer.kind.expert == ExpertKind::Glu ? 3 : 2;
  const auto at = [](std::span<const float> values, std::int64_t i) {
    return values.empty() ? 0.0 : double{values[static_cast<std::size_t>(i)]};
  };
  Mixture out;
  for (std::size_t t = 0; t < static_cast<std::size_t>(x.rows); ++t) {
    const Sums x_t = exactly({x.row(static_cast<std::int64_t>(t)), d_model});
    const Sums scores = scores_of(layer, x_t);
    Sums y = exactly(layer.bias);
    for (std::int64_t i = 0; i < layer.n_shared(); ++i) {
      add_neuron(layer, layer.shared, n_rows * i, 1, at(layer.shared_bias, i), 0, exactly(1), x_t,
                 y);
    }
    const std::span<const std::int32_t> ids = std::span(selected).subspan(t * k, k);
    const Sums gates = gates_of(layer, scores, ids);
    for (std::size_t j = 0; j < k; ++j) {
      for (std::int64_t n = 0; n < layer.block; ++n) {
        const std::int64_t i = ids[j] * layer.block + n;
        add_neuron(layer, layer.experts, ids[j] * layer.block * n_rows + n, layer.block,
                   at(layer.expert_bias, i), at(layer.expert_mean, i), gates[j], x_t, y);
      }
    }
    if (!layer.bypass_p.empty()) {
      const Sums bypass = times(layer.bypass_p, times(layer.bypass_q, x_t));
      for (std::size_t i = 0; i < d_model; ++i) y[i].add(bypass[i]);
    }
    const auto append = [](const Sums& sums, std::vector<double>& values,
                           std::vector<double>& magnitudes) {
      for (const Sum& s : sums) {
        values.push_back(s.value);
        magnitudes.push_back(s.magnitude);
      }
    };
    append(scores, out.scores, out.score_magnitude);
    append(gates, out.gates, out.gate_magnitude);
    append(y, out.y, out.magnitude);
  }
  return out;
}

}  // namespace moesaic::reference
