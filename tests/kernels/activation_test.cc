#include "kernels/activation.h"

#include "kernels/base/error.h"
#include "tests/kernels/support.h"
#include "tests/reference/ops.h"

namespace moesaic {
namespace {

using kernels::Activation;

constexpr Activation kBoth[] = {Activation::Silu, Activation::GeluTanh};

// An exponential of a rounded argument z is off by |z| · ε per rounding of z (three for GELU), and
// a handful of roundings follow. Below the normal range of float32 nothing is left.
double tolerance(Activation phi, double x, double expected) {
  const double z = phi == Activation::Silu ? x : 1.6 * x + 0.0714 * x * x * x;
  const double steps = 4 + (phi == Activation::Silu ? 1 : 1.5) * std::min(std::abs(z), 90.0);
  return steps * kEps * std::abs(expected) + 1e-35;
}

// −100 to 100, densest at 0, and the special values' neighbourhood.
std::vector<float> grid() {
  std::vector<float> x;
  for (int i = -2000; i <= 2000; ++i) {
    const float t = static_cast<float>(i) / 2000;
    x.push_back(100 * t * t * t);
  }
  for (const float v : {0.0f, -0.0f, 1e-30f, -1e-30f, 1e-40f, 87.0f, -87.0f, -88.0f, -103.0f, 1e4f,
                        -1e4f, 1e15f, -1e15f, 3e38f, -3e38f}) {
    x.push_back(v);
  }
  return x;
}

class GatedActivation : public OnEachTarget {};

TEST_P(GatedActivation, MatchesTheReference) {
  Lender lender;
  const auto gate = grid();
  const auto n = static_cast<std::int64_t>(gate.size());
  const std::vector<float> up(gate.size(), 1.0f);
  for (const Activation phi : kBoth) {
    std::vector<float> h(gate.size());
    kernels::gated_activation(lender.ctx, phi, {gate.data(), 1, n}, {up.data(), 1, n},
                              {h.data(), 1, n});
    for (std::size_t i = 0; i < h.size(); ++i) {
      const double expected = reference::activate(phi, gate[i]);
      EXPECT_NEAR(h[i], expected, tolerance(phi, gate[i], expected)) << "x = " << gate[i];
    }
  }
}

TEST_P(GatedActivation, UngatedIsTheSameBitForBit) {
  Lender lender;
  for (const std::int64_t n : {0, 1, 7, 16, 33, 1536}) {
    const auto x = normal_values(size(n), 5, 3);
    const std::vector<float> ones(size(n), 1.0f);
    for (const Activation phi : kBoth) {
      std::vector<float> gated(size(n)), value = x;
      kernels::gated_activation(lender.ctx, phi, {x.data(), 1, n}, {ones.data(), 1, n},
                                {gated.data(), 1, n});
      kernels::activation(phi, value, value);
      EXPECT_EQ(value, gated);
    }
  }
  std::vector<float> shorter(2);
  EXPECT_THROW(kernels::activation(Activation::Silu, std::vector<float>(3), shorter), ShapeError);
}

TEST_P(GatedActivation, AgreesWithTheScalarDefinition) {
  Lender lender(2);
  for (const std::int64_t rows : {1, 3, 40}) {
    for (const std::int64_t d : {1, 7, 16, 33, 1536}) {
      const auto gate = normal_values(size(rows * d), 1, 3);
      const auto up = normal_values(size(rows * d), 2);
      for (const Activation phi : kBoth) {
        std::vector<float> h(gate.size());
        kernels::gated_activation(lender.ctx, phi, {gate.data(), rows, d}, {up.data(), rows, d},
                                  {h.data(), rows, d});
        for (std::size_t i = 0; i < h.size(); ++i) {
          const double expected = double{kernels::activate(phi, gate[i])} * up[i];
          ASSERT_NEAR(h[i], expected, 2 * tolerance(phi, gate[i], expected));
        }
      }
    }
  }
}

TEST_P(GatedActivation, SpecialValues) {
  Lender lender;
  const std::vector<float> gate = {kInf, -kInf, kNan, 1.0f, 0.0f};
  const std::vector<float> up = {1.0f, 1.0f, 1.0f, kNan, 5.0f};
  for (const Activation phi : kBoth) {
    std::vector<float> h(5);
    kernels::gated_activation(lender.ctx, phi, {gate.data(), 1, 5}, {up.data(), 1, 5},
                              {h.data(), 1, 5});
    EXPECT_EQ(h[0], kInf);
    EXPECT_EQ(h[1], 0.0f);
    EXPECT_TRUE(std::isnan(h[2]));
    EXPECT_TRUE(std::isnan(h[3]));
    EXPECT_EQ(h[4], 0.0f);
  }
}

TEST_P(GatedActivation, OutputMayBeEitherInput) {
  Lender lender;
  const auto gate = normal_values(100, 3);
  const auto up = normal_values(100, 4);
  std::vector<float> apart(100);
  auto over_gate = gate;
  auto over_up = up;
  kernels::gated_activation(lender.ctx, Activation::Silu, {gate.data(), 2, 50}, {up.data(), 2, 50},
                            {apart.data(), 2, 50});
  kernels::gated_activation(lender.ctx, Activation::Silu, {over_gate.data(), 2, 50},
                            {up.data(), 2, 50}, {over_gate.data(), 2, 50});
  kernels::gated_activation(lender.ctx, Activation::Silu, {gate.data(), 2, 50},
                            {over_up.data(), 2, 50}, {over_up.data(), 2, 50});
  EXPECT_EQ(over_gate, apart);
  EXPECT_EQ(over_up, apart);
}

TEST_P(GatedActivation, EmptyBatch) {
  Lender lender;
  EXPECT_NO_THROW(kernels::gated_activation(lender.ctx, Activation::Silu, {nullptr, 0, 8},
                                            {nullptr, 0, 8}, {nullptr, 0, 8}));
}

// φ' against a central difference of the reference: its error is h²/6 of a third derivative below
// 2, and the rounding of the two values over h.
TEST_P(GatedActivation, SlopeIsTheDerivative) {
  const auto x = grid();
  for (const Activation phi : kBoth) {
    std::vector<float> value(x.size());
    std::vector<float> slope(x.size());
    kernels::activation_slope(phi, x, value, slope);
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double expected = reference::activate(phi, x[i]);
      EXPECT_NEAR(value[i], expected, tolerance(phi, x[i], expected)) << "x = " << x[i];
      const double h = 1e-4;
      const double difference =
          (reference::activate(phi, x[i] + h) - reference::activate(phi, x[i] - h)) / (2 * h);
      if (std::abs(x[i]) > 1e6f) {
        EXPECT_EQ(slope[i], x[i] > 0 ? 1.0f : 0.0f) << "x = " << x[i];
      } else {
        const double rounding = 1e-15 * (1 + std::abs(double{x[i]})) / h;
        EXPECT_NEAR(slope[i], difference, 1e-8 + rounding + 16 * kEps) << "x = " << x[i];
      }
    }
  }
  for (const std::size_t n : {std::size_t{0}, std::size_t{1}, std::size_t{33}}) {
    std::vector<float> value(n);
    std::vector<float> slope(n);
    kernels::activation_slope(Activation::Silu, std::span(x).first(n), value, slope);
    for (std::size_t i = 0; i < n; ++i) EXPECT_FALSE(std::isnan(slope[i]));
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, GatedActivation, every_target(), target_name);

TEST(Activate, MatchesTheReference) {
  for (const Activation phi : kBoth) {
    for (const float x : grid()) {
      const double expected = reference::activate(phi, x);
      EXPECT_NEAR(kernels::activate(phi, x), expected, tolerance(phi, x, expected)) << "x = " << x;
    }
    EXPECT_EQ(kernels::activate(phi, kInf), kInf);
    EXPECT_EQ(kernels::activate(phi, -kInf), 0.0f);
    EXPECT_TRUE(std::isnan(kernels::activate(phi, kNan)));
  }
}

TEST(ActivationErrors, NamesTheShapes) {
  Lender lender;
  std::vector<float> x(16);
  EXPECT_THROW(kernels::gated_activation(lender.ctx, Activation::Silu, {x.data(), 2, 8},
                                         {x.data(), 1, 8}, {x.data(), 2, 8}),
               ShapeError);
  EXPECT_THROW(kernels::gated_activation(lender.ctx, Activation::Silu, {x.data(), 1, 8},
                                         {x.data(), 1, 8}, {x.data(), 1, 7}),
               ShapeError);
}

}  // namespace
}  // namespace moesaic
