#include "kernels/cuda/top_k.h"

#include "kernels/base/error.h"
#include "tests/kernels/cuda/device.h"
#include "tests/kernels/support.h"
#include "tests/reference/ops.h"

namespace moesaic::cuda {
namespace {

class TopK : public OnDevice {
 protected:
  void expect_top_k(const std::vector<float>& scores, std::int64_t rows, std::int64_t k) {
    const std::int64_t n = static_cast<std::int64_t>(scores.size()) / rows;
    const DeviceMatrix in(scores, rows, n, stream);
    const DeviceBuffer<std::int32_t> ids(size(rows * k));
    top_k(in.view(), k, ids.data(), stream);
    const auto found = on_host(ids, stream);
    for (std::int64_t r = 0; r < rows; ++r) {
      const auto expected =
          reference::top_k(std::span(scores).subspan(size(r * n), size(n)), size(k));
      const std::vector<std::int32_t> row(found.begin() + r * k, found.begin() + (r + 1) * k);
      EXPECT_EQ(row, expected) << "n " << n << " k " << k << " row " << r;
    }
  }
};

TEST_F(TopK, SizesAndKs) {
  for (const std::int64_t n : {1, 31, 32, 33, 511, 512, 513, 1408, 5000}) {
    const auto scores = normal_values(size(n), static_cast<unsigned>(n));
    for (const std::int64_t k : {std::int64_t{0}, std::int64_t{1}, n / 4, n - 1, n}) {
      expect_top_k(scores, 1, k);
    }
  }
}

TEST_F(TopK, SeveralRows) { expect_top_k(normal_values(5 * 300, 1), 5, 40); }

TEST_F(TopK, TiesPickLowestId) {
  auto scores = normal_values(2000, 2);
  for (float& s : scores) s = std::round(s);
  for (const std::int64_t k : {1, 7, 256, 1000, 1999}) expect_top_k(scores, 1, k);
  expect_top_k(std::vector<float>(1200, 0.25f), 1, 700);
}

TEST_F(TopK, ZeroEqualsMinusZero) {
  std::vector<float> scores(700, -0.0f);
  for (std::size_t i = 1; i < scores.size(); i += 2) scores[i] = 0.0f;
  expect_top_k(scores, 1, 20);
}

TEST_F(TopK, NanCountsAsMinusInfinityAndInfinities) {
  expect_top_k({kNan, -kInf, -kNan, 1, kInf}, 1, 2);
  expect_top_k({kNan, -kInf, -kNan, 1, kInf}, 1, 3);
  expect_top_k({kNan, -std::numeric_limits<float>::max()}, 1, 1);
  expect_top_k(std::vector<float>(600, -kNan), 1, 550);
  auto scores = normal_values(900, 7);
  for (std::size_t i = 0; i < 900; i += 3) scores[i] = i % 2 == 0 ? kInf : -kInf;
  for (const std::int64_t k : {1, 150, 151, 600, 899}) expect_top_k(scores, 1, k);
}

TEST_F(TopK, ScoresOfAllMagnitudes) {
  auto scores = normal_values(999, 5);
  for (std::size_t i = 0; i < scores.size(); ++i) {
    scores[i] = std::ldexp(scores[i], static_cast<int>(i % 250) - 125);
  }
  for (const std::int64_t k : {1, 300, 500, 998}) expect_top_k(scores, 1, k);
}

TEST_F(TopK, NamesTheShapes) {
  const DeviceMatrix x(1, 4), y(1, 5);
  EXPECT_THROW(top_k(x.view(), 5, nullptr, stream), ShapeError);
  EXPECT_THROW(top_k(x.view(), -1, nullptr, stream), ShapeError);
  EXPECT_THROW(softmax(x.view(), y.view(), stream), ShapeError);
}

TEST_F(TopK, Softmax) {
  for (const std::int64_t n : {1, 2, 33, 512, 1409}) {
    auto x = normal_values(size(3 * n), 8, 4);
    for (std::int64_t i = 0; i < n; ++i) x[size(n + i)] += 1000;
    const DeviceMatrix m(x, 3, n, stream);
    softmax(m.view(), m.view(), stream);
    const auto y = m.host(stream);
    for (std::int64_t r = 0; r < 3; ++r) {
      const auto row = std::span(x).subspan(size(r * n), size(n));
      double maximum = -HUGE_VAL, sum = 0;
      for (const float v : row) maximum = std::max(maximum, double{v});
      for (const float v : row) sum += std::exp(v - maximum);
      for (std::int64_t i = 0; i < n; ++i) {
        const double z = row[size(i)] - maximum, expected = std::exp(z) / sum;
        EXPECT_NEAR(y[size(r * n + i)], expected, (16 - z) * kEps * expected + 1e-38);
      }
    }
  }
}

TEST_F(TopK, SoftmaxOfNanAndInfinity) {
  const DeviceMatrix m({kNan, 0, 1, -kInf, 0, 0}, 2, 3, stream);
  softmax(m.view(), m.view(), stream);
  const auto y = m.host(stream);
  for (std::size_t i = 0; i < 3; ++i) EXPECT_TRUE(std::isnan(y[i]));
  EXPECT_EQ(y[3], 0);
  EXPECT_EQ(y[4], 0.5f);
}

}  // namespace
}  // namespace moesaic::cuda
