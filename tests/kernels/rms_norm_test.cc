#include "kernels/rms_norm.h"

#include "kernels/base/error.h"
#include "tests/kernels/support.h"
#include "tests/reference/ops.h"

namespace moesaic {
namespace {

class RmsNorm : public OnEachTarget {};

// The sum of n squares in float32 is off by n · ε/2 at most, of which the root halves; then come
// four roundings.
void expect_close(const std::vector<float>& y, const std::vector<double>& expected,
                  std::int64_t d) {
  ASSERT_EQ(y.size(), expected.size());
  const double relative = (static_cast<double>(d) / 4 + 4) * kEps;
  for (std::size_t i = 0; i < y.size(); ++i) {
    EXPECT_NEAR(y[i], expected[i], relative * std::abs(expected[i]) + 1e-37) << i;
  }
}

TEST_P(RmsNorm, MatchesTheReference) {
  for (const int threads : {1, 3}) {
    Lender lender(threads);
    for (const std::int64_t d : {1, 5, 16, 20, 33, 576, 640}) {
      for (const std::int64_t rows : {1, 2, 100}) {
        const auto x = normal_values(size(rows * d), 1, 3);
        const auto weight = normal_values(size(d), 2);
        std::vector<float> y(x.size());
        kernels::rms_norm(lender.ctx, {x.data(), rows, d}, weight, 1e-5f, {y.data(), rows, d});
        expect_close(y, reference::rms_norm({x.data(), rows, d}, weight, 1e-5f), d);
      }
    }
  }
}

TEST_P(RmsNorm, InPlaceAndStrided) {
  Lender lender;
  const std::int64_t rows = 4, d = 37, stride = 50;
  auto x = normal_values(size(rows * stride), 3);
  const auto before = x;
  const auto weight = normal_values(size(d), 4);
  const auto expected = reference::rms_norm({before.data(), rows, d, stride}, weight, 1e-6f);
  kernels::rms_norm(lender.ctx, {x.data(), rows, d, stride}, weight, 1e-6f,
                    {x.data(), rows, d, stride});
  std::vector<float> y;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t i = 0; i < stride; ++i) {
      const std::size_t at = size(r * stride + i);
      if (i < d) {
        y.push_back(x[at]);
      } else {
        EXPECT_EQ(x[at], before[at]);
      }
    }
  }
  expect_close(y, expected, d);
}

TEST_P(RmsNorm, EmptyBatch) {
  Lender lender(2);
  const std::vector<float> weight(8, 1.0f);
  EXPECT_NO_THROW(kernels::rms_norm(lender.ctx, {nullptr, 0, 8}, weight, 1e-5f, {nullptr, 0, 8}));
}

TEST_P(RmsNorm, ZeroRowStaysZero) {
  Lender lender;
  const std::vector<float> x(24, 0.0f), weight(24, 2.0f);
  std::vector<float> y(24, 1.0f);
  kernels::rms_norm(lender.ctx, {x.data(), 1, 24}, weight, 1e-5f, {y.data(), 1, 24});
  EXPECT_EQ(y, x);
}

TEST_P(RmsNorm, NanStaysInItsRow) {
  Lender lender;
  auto x = normal_values(60, 5);
  x[25] = kNan;
  const std::vector<float> weight(20, 1.0f);
  std::vector<float> y(60);
  kernels::rms_norm(lender.ctx, {x.data(), 3, 20}, weight, 1e-5f, {y.data(), 3, 20});
  for (std::size_t i = 0; i < 60; ++i) EXPECT_EQ(std::isnan(y[i]), i / 20 == 1) << i;
}

TEST_P(RmsNorm, SameForAnyThreadCount) {
  const std::int64_t rows = 77, d = 576;
  const auto x = normal_values(size(rows * d), 6);
  const auto weight = normal_values(size(d), 7);
  std::vector<float> y[2] = {std::vector<float>(x.size()), std::vector<float>(x.size())};
  for (int i = 0; i < 2; ++i) {
    Lender lender(1 + 3 * i);
    kernels::rms_norm(lender.ctx, {x.data(), rows, d}, weight, 1e-5f, {y[i].data(), rows, d});
  }
  EXPECT_EQ(y[0], y[1]);
}

TEST_P(RmsNorm, AddAddsExactly) {
  Lender lender(2);
  for (const std::int64_t rows : {0, 1, 3, 200}) {
    const std::int64_t d = 101;
    const auto y = normal_values(size(rows * d), 8);
    auto x = normal_values(size(rows * d), 9);
    auto expected = x;
    for (std::size_t i = 0; i < x.size(); ++i) expected[i] += y[i];
    kernels::add(lender.ctx, {y.data(), rows, d}, {x.data(), rows, d});
    EXPECT_EQ(x, expected);
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, RmsNorm, every_target(), target_name);

TEST(RmsNormErrors, NamesTheShapes) {
  Lender lender;
  std::vector<float> x(16), weight(8);
  EXPECT_THROW(kernels::rms_norm(lender.ctx, {x.data(), 2, 8}, weight, 1e-5f, {x.data(), 1, 8}),
               ShapeError);
  EXPECT_THROW(kernels::rms_norm(lender.ctx, {x.data(), 1, 16}, weight, 1e-5f, {x.data(), 1, 16}),
               ShapeError);
  EXPECT_THROW(kernels::add(lender.ctx, {x.data(), 2, 8}, {x.data(), 1, 8}), ShapeError);
}

}  // namespace
}  // namespace moesaic
