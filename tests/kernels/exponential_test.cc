#include "kernels/exponential.h"

#include "kernels/base/error.h"
#include "tests/kernels/support.h"

namespace moesaic {
namespace {

class Exponentials : public OnEachTarget {};

TEST_P(Exponentials, EqualTheLibrarysAndTheirSum) {
  for (const std::size_t n : {std::size_t{0}, std::size_t{1}, std::size_t{15}, std::size_t{200}}) {
    const std::vector<float> x = normal_values(n, 4, 20);
    std::vector<float> y(n, kNan);
    const float shift = 30;
    const float sum = kernels::exponentials(x, shift, y);
    double expected_sum = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const double expected = std::exp(std::min(double{x[i]} - shift, 0.0));
      // The difference is rounded once, at up to |x| + shift.
      EXPECT_NEAR(y[i], expected, expected * kEps * (8 + std::abs(x[i]) + shift) + 1e-38);
      expected_sum += expected;
    }
    EXPECT_NEAR(sum, expected_sum, expected_sum * kEps * 400);
  }
}

TEST_P(Exponentials, NeverAboveOneAndNanStays) {
  std::vector<float> x(40, 5.0f);
  x[3] = kNan;
  x[4] = -kInf;
  const float sum = kernels::exponentials(x, 1, x);
  EXPECT_EQ(x[0], 1.0f);
  EXPECT_EQ(x[39], 1.0f);
  EXPECT_TRUE(std::isnan(x[3]));
  EXPECT_EQ(x[4], 0.0f);
  EXPECT_TRUE(std::isnan(sum));
}

INSTANTIATE_TEST_SUITE_P(Targets, Exponentials, every_target(), target_name);

TEST(ExponentialsErrors, NamesTheLengths) {
  std::vector<float> x(3);
  std::vector<float> y(2);
  EXPECT_THROW(kernels::exponentials(x, 0, y), ShapeError);
}

}  // namespace
}  // namespace moesaic
