#include "kernels/thresholds.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace moesaic::kernels {
namespace {

std::vector<float> random(std::size_t n, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> out(n);
  for (float& v : out) v = normal(rng);
  return out;
}

// By the definition: lengths with and without a rest behind whole vectors, NaN, a tie.
class Slopes : public testing::TestWithParam<std::size_t> {};

TEST_P(Slopes, AreThoseOfTheNeuronsThatAreKept) {
  const std::size_t n = GetParam();
  for (const bool gated : {true, false}) {
    std::vector<float> a = random(n, 1), u = random(n, 2), slope = random(n, 3);
    std::vector<float> gate(n, 0.5F), hidden(n, 0.3F);
    if (n > 0) {
      gate[0] = std::fabs(a[0]);  // as large as its threshold: routed
      hidden[0] = std::fabs(a[0] * u[0]);
      u[n / 2] = std::numeric_limits<float>::quiet_NaN();
    }
    NeuronCounts expected;
    std::vector<float> a_out(n), u_out(n), slope_out(n);
    for (std::size_t i = 0; i < n; ++i) {
      const bool routed = !gated || std::fabs(a[i]) >= gate[i];
      const bool kept = routed && std::fabs(a[i] * u[i]) >= hidden[i];
      expected.routed += routed;
      expected.kept += kept;
      if (!kept) continue;
      a_out[i] = a[i];
      u_out[i] = a[i] * u[i];
      slope_out[i] = slope[i] * u[i];
    }
    const NeuronCounts counts = keep_slopes(gated ? gate.data() : nullptr, hidden.data(), n,
                                            a.data(), u.data(), slope.data());
    EXPECT_EQ(counts.routed, expected.routed);
    EXPECT_EQ(counts.kept, expected.kept);
    EXPECT_EQ(a, a_out);
    EXPECT_EQ(u, u_out);
    EXPECT_EQ(slope, slope_out);
  }
}

INSTANTIATE_TEST_SUITE_P(Lengths, Slopes, testing::Values(0, 1, 15, 16, 17, 64, 131));

}  // namespace
}  // namespace moesaic::kernels
