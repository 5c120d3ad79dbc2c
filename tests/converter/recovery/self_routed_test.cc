// The self-routed layer forward and backward: against an obvious loop, and in float64 against
// central differences, away from the thresholds.

#include "converter/recovery/self_routed.h"

#include <optional>

#include "converter/recovery/pack_matrix.h"
#include "converter/recovery/pack_self_routed.h"
#include "kernels/base/error.h"
#include "tests/converter/recovery/gradient_check.h"

namespace moesaic::converter {
namespace {

struct SelfRoutedCase {
  const char* name;
  SelfRoutedShape shape;
};

void PrintTo(const SelfRoutedCase& c, std::ostream* out) { *out << c.name; }

double activate(kernels::Activation phi, double x) {
  double value = 0, slope = 0;
  activation_slope(phi, &x, 1, &value, &slope);
  return value;
}

// The middle of the widest gap between the magnitudes: no step of a difference crosses it.
double in_gap(std::vector<double> values) {
  for (double& v : values) v = std::abs(v);
  std::sort(values.begin(), values.end());
  double at = 0, widest = 0;
  for (std::size_t i = 1; i < values.size(); ++i) {
    if (values[i] - values[i - 1] > widest) {
      widest = values[i] - values[i - 1];
      at = (values[i] + values[i - 1]) / 2;
    }
  }
  return at;
}

constexpr std::int64_t kTokens = 6;

// A random layer with inputs, a gradient of its output, and the loop that says what it shall give.
struct Layer {
  explicit Layer(const SelfRoutedShape& shape)
      : shape(shape),
        parameters(shape),
        gradient(shape),
        x(kTokens, shape.d_model, 21),
        y(kTokens, shape.d_model, 22),
        dx(kTokens, shape.d_model, 23),
        dy(kTokens, shape.d_model, 24) {
    std::mt19937_64 rng(7);
    std::normal_distribution<double> normal(0, 0.5);
    for (const std::span<double> t : parameters.tensors()) {
      for (double& v : t) v = normal(rng);
    }
    const auto n = static_cast<std::size_t>(shape.d_ff);
    SelfRoutedThresholds<double> thresholds;
    for (std::int64_t j = 0; j < shape.d_model; ++j) {
      std::vector<double> values;
      for (std::int64_t t = 0; t < kTokens; ++t) values.push_back(x.view().row(t)[j]);
      thresholds.input.push_back(in_gap(values));
    }
    // Each threshold comes from what the ones before it leave.
    reference = thresholds;
    reference.gate.assign(n, 0);
    reference.hidden.assign(n, 0);
    for (std::int64_t i = 0; i < shape.d_ff && !shape.up_by_input; ++i) {
      std::vector<double> values;
      for (std::int64_t t = 0; t < kTokens; ++t) values.push_back(neuron(t, i).a);
      thresholds.gate.push_back(in_gap(values));
    }
    if (!shape.up_by_input) reference.gate = thresholds.gate;
    for (std::int64_t i = 0; i < shape.d_ff; ++i) {
      std::vector<double> values;
      for (std::int64_t t = 0; t < kTokens; ++t) values.push_back(neuron(t, i).h);
      thresholds.hidden.push_back(in_gap(values));
    }
    reference.hidden = thresholds.hidden;
    layer.emplace(shape, parameters, thresholds);
  }

  struct Neuron {
    double a = 0, u = 0, h = 0;
    bool routed = false, kept = false;
  };
  bool large(std::int64_t t, std::int64_t j) const {
    return std::abs(x.view().row(t)[j]) >= reference.input[static_cast<std::size_t>(j)];
  }
  Neuron neuron(std::int64_t t, std::int64_t i) const {
    double g = 0;
    Neuron out;
    for (std::int64_t j = 0; j < shape.d_model; ++j) {
      const auto w = static_cast<std::size_t>(i * shape.d_model + j);
      const double value = x.view().row(t)[j];
      if (large(t, j)) g += parameters.w_gate[w] * value;
      if (large(t, j) || !shape.up_by_input) out.u += parameters.w_up[w] * value;
    }
    const auto index = static_cast<std::size_t>(i);
    out.a = activate(shape.phi, g);
    out.routed = std::abs(out.a) >= reference.gate[index];
    out.kept = out.routed && std::abs(out.a * out.u) >= reference.hidden[index];
    out.h = out.kept ? out.a * out.u : 0;
    return out;
  }

  double output() {
    layer->refresh(lent.ctx);
    layer->forward(lent.ctx, x.view(), tape, y.view());
    return weighted_sum(dy, y);
  }
  void backward(bool straight_through = false) {
    output();
    layer->backward(lent.ctx, straight_through, dy.view(), tape, gradient, dx.view());
  }

  Lent lent;
  SelfRoutedShape shape;
  SelfRoutedParameters<double> parameters, gradient;
  SelfRoutedThresholds<double> reference;
  std::optional<SelfRoutedLayer<Float64>> layer;
  SelfRoutedTape<Float64> tape;
  RandomMatrix x, y, dx, dy;
};

class RecoverySelfRouted : public testing::TestWithParam<SelfRoutedCase> {};

TEST_P(RecoverySelfRouted, ForwardIsTheLoop) {
  Layer c(GetParam().shape);
  c.output();
  SelfRoutedCounts counts{.tokens = kTokens};
  for (std::int64_t t = 0; t < kTokens; ++t) {
    std::vector<double> expected(static_cast<std::size_t>(c.shape.d_model));
    for (std::int64_t j = 0; j < c.shape.d_model; ++j) counts.inputs += c.large(t, j);
    for (std::int64_t i = 0; i < c.shape.d_ff; ++i) {
      const Layer::Neuron neuron = c.neuron(t, i);
      counts.routed += neuron.routed;
      counts.kept += neuron.kept;
      for (std::int64_t j = 0; j < c.shape.d_model; ++j) {
        expected[static_cast<std::size_t>(j)] +=
            neuron.h * c.parameters.w_down[static_cast<std::size_t>(j * c.shape.d_ff + i)];
      }
    }
    for (std::int64_t j = 0; j < c.shape.d_model; ++j) {
      EXPECT_NEAR(c.y.view().row(t)[j], expected[static_cast<std::size_t>(j)], 1e-12);
    }
  }
  EXPECT_EQ(c.tape.counts.tokens, counts.tokens);
  EXPECT_EQ(c.tape.counts.inputs, counts.inputs);
  EXPECT_EQ(c.tape.counts.routed, counts.routed);
  EXPECT_EQ(c.tape.counts.kept, counts.kept);
  // The thresholds leave some of everything and not all.
  EXPECT_GT(counts.kept, 0);
  EXPECT_LT(counts.inputs, kTokens * c.shape.d_model);
  EXPECT_LT(counts.kept, counts.routed);
}

TEST_P(RecoverySelfRouted, GradientsOfMatricesAndInput) {
  Layer c(GetParam().shape);
  c.backward();
  const auto loss = [&] { return c.output(); };
  const auto values = c.parameters.tensors();
  const auto gradients = c.gradient.tensors();
  for (std::size_t i = 0; i < values.size(); ++i) {
    expect_gradient(values[i], gradients[i], loss, SelfRoutedParameters<double>::kNames[i], 60);
  }
  expect_gradient(c.x.data, c.dx.data, loss, "x");
}

// What passes the inputs that were left out is what the gate's rows send back to them.
TEST_P(RecoverySelfRouted, StraightThroughAddsTheGradientOfWhatWasLeftOut) {
  Layer masked(GetParam().shape), c(GetParam().shape);
  masked.backward(false);
  c.backward(true);
  double most = 0;
  for (std::int64_t t = 0; t < kTokens; ++t) {
    for (std::int64_t j = 0; j < c.shape.d_model; ++j) {
      double expected = 0;
      for (std::int64_t i = 0; i < c.shape.d_ff && !c.large(t, j); ++i) {
        const auto w = static_cast<std::size_t>(i * c.shape.d_model + j);
        // The tape's slopes hold dg and du after the way back.
        expected += c.tape.slope_gate.view().row(t)[i] * c.parameters.w_gate[w];
        if (c.shape.up_by_input) {
          expected += c.tape.slope_up.view().row(t)[i] * c.parameters.w_up[w];
        }
      }
      EXPECT_NEAR(c.dx.view().row(t)[j] - masked.dx.view().row(t)[j], expected, 1e-12);
      most = std::max(most, std::abs(expected));
    }
  }
  EXPECT_GT(most, 0.1);
}

TEST_P(RecoverySelfRouted, GradientsAreAddedAndDxMayBeLeftOut) {
  Layer c(GetParam().shape);
  c.backward();
  const std::vector<double> once(c.gradient.w_down.begin(), c.gradient.w_down.end());
  c.output();
  c.layer->backward(c.lent.ctx, false, c.dy.view(), c.tape, c.gradient, {});
  for (std::size_t i = 0; i < once.size(); ++i) {
    ASSERT_DOUBLE_EQ(c.gradient.w_down[i], 2 * once[i]);
  }
}

TEST_P(RecoverySelfRouted, FactorsScaleTheThresholds) {
  Layer c(GetParam().shape);
  c.output();
  const SelfRoutedCounts before = c.tape.counts;
  c.layer->factors() = {2, 3, 4};
  c.output();
  EXPECT_LT(c.tape.counts.inputs, before.inputs);
  for (std::size_t j = 0; j < c.reference.input.size(); ++j) {
    EXPECT_DOUBLE_EQ(c.layer->thresholds().input[j], 2 * c.reference.input[j]);
  }
  for (std::size_t i = 0; i < c.reference.hidden.size(); ++i) {
    EXPECT_DOUBLE_EQ(c.layer->thresholds().hidden[i], 4 * c.reference.hidden[i]);
    if (!c.shape.up_by_input) {
      EXPECT_DOUBLE_EQ(c.layer->thresholds().gate[i], 3 * c.reference.gate[i]);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, RecoverySelfRouted,
    testing::Values(SelfRoutedCase{"Gate", {kernels::Activation::Silu, false, 12, 20}},
                    SelfRoutedCase{"GateGelu", {kernels::Activation::GeluTanh, false, 17, 9}},
                    SelfRoutedCase{"Input", {kernels::Activation::Silu, true, 12, 20}}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(SelfRoutedLayer, ThresholdsOfAnotherShape) {
  const SelfRoutedShape shape{kernels::Activation::Silu, false, 4, 6};
  SelfRoutedParameters<double> parameters(shape);
  SelfRoutedThresholds<double> thresholds{std::vector<double>(4), std::vector<double>(6),
                                          std::vector<double>(5)};
  EXPECT_THROW(SelfRoutedLayer<Float64>(shape, parameters, thresholds), ShapeError);
}

// How many of |v| >= f θ there are at the factor found, by counting.
double share_at(const std::vector<float>& v, const std::vector<float>& threshold, float factor) {
  double n = 0;
  for (std::size_t i = 0; i < v.size(); ++i) {
    n += std::abs(v[i]) >= threshold[i % threshold.size()] * factor;
  }
  return n / static_cast<double>(v.size());
}

TEST(FactorForShare, LeavesTheShareThatWasAsked) {
  Lent lent;
  RandomMatrix random(50, 20, 3);
  std::vector<float> v(random.data.begin(), random.data.end());
  std::vector<float> threshold;
  for (int i = 0; i < 20; ++i) threshold.push_back(0.2F + 0.1F * static_cast<float>(i));
  for (const double share : {0.001, 0.25, 0.5, 0.999, 1.0}) {
    std::vector<float> scratch = v;
    const float f = factor_for_share(lent.ctx, {scratch.data(), 50, 20}, threshold, share);
    // Multiplying back may move one entry over its threshold.
    EXPECT_NEAR(share_at(v, threshold, f), share, 1.5e-3) << share;
  }
  std::vector<float> scratch = v;
  const float none = factor_for_share(lent.ctx, {scratch.data(), 50, 20}, threshold, 0);
  EXPECT_LE(share_at(v, threshold, none), 1e-3);
}

TEST(FactorForShare, ZeroThresholdsAndMissingEntries) {
  Lent lent;
  // Half of the columns cannot be left out: a smaller share has no factor.
  std::vector<float> v = {1, 2, 3, 4};
  EXPECT_EQ(factor_for_share(lent.ctx, {v.data(), 2, 2}, std::vector<float>{0, 1}, 0.5), 1);
  // Fewer entries than the share asks for: all of them.
  v = {0, 0, 0, 4};
  EXPECT_EQ(factor_for_share(lent.ctx, {v.data(), 2, 2}, std::vector<float>{1, 1}, 0.5), 0);
}

TEST(WritableType, OwnElseAskedForElseQ8) {
  EXPECT_EQ(writable_type(DType::Q4_1, {}, 64), DType::Q4_1);
  EXPECT_EQ(writable_type(DType::Q4_1, DType::Q8_0, 64), DType::Q8_0);
  EXPECT_EQ(writable_type(DType::Q4_K, {}, 512), DType::Q8_0);
  EXPECT_EQ(writable_type(DType::Q4_K, {}, 40), DType::BF16);
  EXPECT_THROW(writable_type(DType::F32, DType::Q8_0, 40), InputError);
}

}  // namespace
}  // namespace moesaic::converter
