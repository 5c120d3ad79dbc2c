// The secret-MoE layer's backward pass in float64 against central differences.

#include "converter/recovery/moe.h"

#include "tests/converter/recovery/gradient_check.h"
#include "tests/models/tiny_model.h"

namespace moesaic::converter {
namespace {

struct MoeCase {
  const char* name;
  MoeShape shape;
};

void PrintTo(const MoeCase& c, std::ostream* out) { *out << c.name; }

// A random layer with inputs and a gradient of its output.
struct Layer {
  explicit Layer(const MoeShape& shape, std::int64_t n_tokens = 5)
      : parameters(shape),
        gradient(shape),
        x(n_tokens, shape.d_model, 21),
        y(n_tokens, shape.d_model, 22),
        dx(n_tokens, shape.d_model, 23),
        dy(n_tokens, shape.d_model, 24) {
    std::mt19937_64 rng(7);
    std::normal_distribution<double> normal(0, 0.5);
    for (const std::span<double> t : parameters.tensors()) {
      for (double& v : t) v = normal(rng);
    }
    std::vector<double> mean(static_cast<std::size_t>(shape.n_neurons()));
    for (std::int64_t i = shape.n_shared; i < shape.n_neurons(); ++i) {
      mean[static_cast<std::size_t>(i)] = 0.1 * normal(rng);
    }
    layer.emplace(shape, parameters, mean);
    for (std::int64_t t = 0; t < n_tokens; ++t) {
      weight.push_back(0.5 + 0.25 * static_cast<double>(t));
      total_weight += weight.back();
    }
  }

  double output() {
    layer->refresh(lent.ctx);
    layer->forward(lent.ctx, router, x.view(), 0, tape, y.view());
    return weighted_sum(dy, y);
  }
  double auxiliary() {
    output();
    MoeParameters<double> scratch(layer->shape());
    return layer->backward(lent.ctx, router, dy.view(), weight, total_weight, tape, scratch, {});
  }
  void backward() {
    output();
    layer->backward(lent.ctx, router, dy.view(), weight, total_weight, tape, gradient, dx.view());
  }

  Lent lent;
  MoeParameters<double> parameters, gradient;
  std::optional<MoeLayer<Float64>> layer;
  RouterTraining router;
  MoeTape<Float64> tape;
  RandomMatrix x, y, dx;
  RandomMatrix dy;
  std::vector<double> weight;
  double total_weight = 0;
};

class RecoveryMoe : public testing::TestWithParam<MoeCase> {};

TEST_P(RecoveryMoe, GradientsOfNeuronsBypassBiasAndInput) {
  Layer c(GetParam().shape);
  c.backward();
  const auto loss = [&] { return c.output(); };
  const auto values = c.parameters.tensors();
  const auto gradients = c.gradient.tensors();
  const char* names[] = {"gate", "up", "down", "bypass q", "bypass p", "bias"};
  for (std::size_t i = 0; i < MoeParameters<double>::kFirstOfRouter; ++i) {
    if (values[i].empty()) continue;
    expect_gradient(values[i], gradients[i], loss, names[i], 60);
  }
  expect_gradient(c.x.data, c.dx.data, loss, "x");
}

TEST_P(RecoveryMoe, GradientsOfTheRouterAreThoseOfItsRegression) {
  if (GetParam().shape.n_experts == 0) GTEST_SKIP() << "no router";
  Layer c(GetParam().shape);
  c.router.auxiliary = 0.6;
  c.router.scale = 3;
  c.backward();
  const auto loss = [&] { return 0.6 * c.auxiliary(); };
  const auto values = c.parameters.tensors();
  const auto gradients = c.gradient.tensors();
  const char* names[] = {"router v", "router u", "router bias"};
  for (std::size_t i = 0; i < 3; ++i) {
    const std::size_t t = MoeParameters<double>::kFirstOfRouter + i;
    expect_gradient(values[t], gradients[t], loss, names[i], 60);
  }
}

// The regression's target is the current neurons' contribution, by its definition.
TEST_P(RecoveryMoe, RegressionLossByItsDefinition) {
  const MoeShape& s = GetParam().shape;
  Layer c(s);
  c.router.scale = 2;
  const double found = c.auxiliary();
  double expected = 0;
  const auto dot = [&](const AlignedBuffer<double>& w, std::int64_t row, const double* x,
                       std::int64_t n) {
    double sum = 0;
    for (std::int64_t j = 0; j < n; ++j) sum += w[static_cast<std::size_t>(row * n + j)] * x[j];
    return sum;
  };
  for (std::int64_t t = 0; t < c.x.rows; ++t) {
    const double* x = c.x.view().row(t);
    std::vector<double> z;
    for (std::int64_t i = 0; i < s.router_rank; ++i) {
      z.push_back(dot(c.parameters.router_v, i, x, s.d_model));
    }
    for (std::int64_t e = 0; e < s.n_experts; ++e) {
      const std::int64_t i = s.n_shared + e;
      const double g = dot(c.parameters.w_gate, i, x, s.d_model);
      const double phi = s.phi == kernels::Activation::Silu
                             ? g / (1 + std::exp(-g))
                             : g / (1 + std::exp(-2 * std::sqrt(2 / std::acos(-1.0)) *
                                                 (g + 0.044715 * g * g * g)));
      const double h = phi * dot(c.parameters.w_up, i, x, s.d_model);
      const double* down = c.parameters.w_down.data() + i * s.d_model;
      const double contribution = std::abs(h - c.layer->mean()[static_cast<std::size_t>(i)]) *
                                  std::sqrt(std::inner_product(down, down + s.d_model, down, 0.0));
      const double score = dot(c.parameters.router_u, e, z.data(), s.router_rank) +
                           c.parameters.router_bias[static_cast<std::size_t>(e)];
      expected +=
          c.weight[static_cast<std::size_t>(t)] * (score - contribution) * (score - contribution);
    }
  }
  EXPECT_NEAR(found, expected / (2 * c.total_weight), 1e-10 * (1 + expected));
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, RecoveryMoe,
    testing::Values(MoeCase{"Silu", {kernels::Activation::Silu, 12, 4, 20, 6, 5, 3}},
                    MoeCase{"Gelu", {kernels::Activation::GeluTanh, 12, 4, 20, 6, 5, 3}},
                    MoeCase{"NoShared", {kernels::Activation::Silu, 12, 0, 20, 6, 5, 3}},
                    MoeCase{"NoBypass", {kernels::Activation::Silu, 12, 4, 20, 6, 5, 0}},
                    MoeCase{"AllExperts", {kernels::Activation::Silu, 12, 4, 20, 20, 5, 3}},
                    MoeCase{"OneExpert", {kernels::Activation::GeluTanh, 12, 0, 20, 1, 2, 0}}),
    [](const auto& info) { return std::string(info.param.name); });

// y with gates in place of the selection, to differentiate by them:  g_i (f_i − μ_i) w_down,i.
TEST(RecoveryMoeGate, StraightThroughIsTheGradientOfASoftTopK) {
  const MoeShape s{kernels::Activation::Silu, 12, 4, 20, 6, 5, 3};
  Layer with(s);
  with.router.auxiliary = 0;
  with.router.straight_through = 0.5;
  with.router.width = 0.8;
  with.backward();
  const auto gradient = with.gradient.tensors();

  // Σ_t Σ_i κ_i(t) (e_i − ē) ∂s_i/∂θ by the definition, for the router's bias: ∂s_i/∂c_i = 1.
  std::vector<double> expected(static_cast<std::size_t>(s.n_experts));
  for (std::int64_t t = 0; t < with.x.rows; ++t) {
    const double* x = with.x.view().row(t);
    std::vector<double> scores, effect;
    for (std::int64_t e = 0; e < s.n_experts; ++e) {
      double score = with.parameters.router_bias[static_cast<std::size_t>(e)];
      for (std::int64_t r = 0; r < s.router_rank; ++r) {
        double z = 0;
        for (std::int64_t j = 0; j < s.d_model; ++j) {
          z += with.parameters.router_v[static_cast<std::size_t>(r * s.d_model + j)] * x[j];
        }
        score += with.parameters.router_u[static_cast<std::size_t>(e * s.router_rank + r)] * z;
      }
      scores.push_back(score);
      const auto row = static_cast<std::size_t>((s.n_shared + e) * s.d_model);
      double g = 0, u = 0, along = 0;
      for (std::int64_t j = 0; j < s.d_model; ++j) {
        const std::size_t at = row + static_cast<std::size_t>(j);
        g += with.parameters.w_gate[at] * x[j];
        u += with.parameters.w_up[at] * x[j];
        along += with.parameters.w_down[at] * with.dy.view().row(t)[j];
      }
      effect.push_back((g / (1 + std::exp(-g)) * u -
                        with.layer->mean()[static_cast<std::size_t>(s.n_shared + e)]) *
                       along);
    }
    std::vector<double> sorted = scores;
    std::sort(sorted.rbegin(), sorted.rend());
    const double threshold = (sorted[5] + sorted[6]) / 2;
    double mean = 0, square = 0;
    for (const double v : scores) {
      mean += v / 20;
      square += v * v / 20;
    }
    const double width = 0.8 * std::sqrt(square - mean * mean);
    double sum = 0, weighted = 0;
    std::vector<double> kappa;
    for (std::size_t i = 0; i < scores.size(); ++i) {
      kappa.push_back(std::max(0.0, 1 - std::abs(scores[i] - threshold) / width) / width);
      sum += kappa[i];
      weighted += kappa[i] * effect[i];
    }
    ASSERT_GT(sum, 0);
    for (std::size_t i = 0; i < scores.size(); ++i) {
      expected[i] += 0.5 * kappa[i] * (effect[i] - weighted / sum);
    }
  }
  const std::span<double> found = gradient.back();
  for (std::size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(found[i], expected[i], 1e-10);
}

}  // namespace
}  // namespace moesaic::converter
