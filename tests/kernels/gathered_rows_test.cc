#include "kernels/gathered_rows.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <ostream>
#include <random>
#include <vector>

#include "kernels/base/error.h"

namespace moesaic::kernels {
namespace {

// Columns around the borders of vectors and of eight of them; no rows, and rows that repeat.
struct Case {
  std::int64_t cols, n_rows;
};

void PrintTo(const Case& c, std::ostream* out) {
  *out << c.cols << " columns, " << c.n_rows << " rows";
}

class GatheredRows : public testing::TestWithParam<Case> {
 protected:
  GatheredRows() {
    std::mt19937_64 rng(7);
    std::normal_distribution<float> normal;
    for (auto* values : {&a, &scale, &data}) {
      for (float& v : *values) v = normal(rng);
    }
    for (std::int32_t& r : rows) r = static_cast<std::int32_t>(rng() % 5);
  }

  // Rows are wider apart than they are long.
  ConstMatrix m() const { return {data.data(), 5, GetParam().cols, GetParam().cols + 3}; }
  std::size_t cols() const { return static_cast<std::size_t>(GetParam().cols); }

  std::vector<float> a = std::vector<float>(cols());
  std::vector<float> scale = std::vector<float>(static_cast<std::size_t>(GetParam().n_rows));
  std::vector<float> data = std::vector<float>(5 * (cols() + 3));
  std::vector<std::int32_t> rows =
      std::vector<std::int32_t>(static_cast<std::size_t>(GetParam().n_rows));
};

TEST_P(GatheredRows, DotsEqualTheLoop) {
  std::vector<float> dots(rows.size(), std::numeric_limits<float>::quiet_NaN());
  gathered_dots(a, m(), rows, dots);
  for (std::size_t e = 0; e < rows.size(); ++e) {
    double sum = 0;
    double size = 0;
    for (std::size_t c = 0; c < cols(); ++c) {
      const double product = static_cast<double>(a[c]) * m().row(rows[e])[c];
      sum += product;
      size += std::abs(product);
    }
    EXPECT_NEAR(dots[e], sum, 1e-6 * size + 1e-30) << e;
  }
}

TEST_P(GatheredRows, SumsEqualTheLoop) {
  for (const bool accumulate : {false, true}) {
    const float before = accumulate ? 1.5F : std::numeric_limits<float>::quiet_NaN();
    std::vector<float> sum(cols(), before);
    gathered_sum(scale, m(), rows, sum, accumulate);
    for (std::size_t c = 0; c < cols(); ++c) {
      double expected = accumulate ? 1.5 : 0;
      double size = expected;
      for (std::size_t e = 0; e < rows.size(); ++e) {
        const double product = static_cast<double>(scale[e]) * m().row(rows[e])[c];
        expected += product;
        size += std::abs(product);
      }
      EXPECT_NEAR(sum[c], expected, 1e-6 * size + 1e-30) << c;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, GatheredRows,
                         testing::Values(Case{1, 1}, Case{15, 3}, Case{16, 4}, Case{17, 5},
                                         Case{128, 9}, Case{145, 8}, Case{640, 26}, Case{64, 0}),
                         [](const auto& info) {
                           return "Cols" + std::to_string(info.param.cols) + "Rows" +
                                  std::to_string(info.param.n_rows);
                         });

TEST(GatheredRows, ShapesThatDoNotFit) {
  std::vector<float> values(8);
  const std::vector<std::int32_t> rows(2);
  const ConstMatrix m(values.data(), 2, 4);
  const std::span<float> all(values);
  EXPECT_THROW(gathered_dots(all.first(3), m, rows, all.first(2)), ShapeError);
  EXPECT_THROW(gathered_dots(all.first(4), m, rows, all.first(3)), ShapeError);
  EXPECT_THROW(gathered_sum(all.first(1), m, rows, all.first(4), false), ShapeError);
  EXPECT_THROW(gathered_sum(all.first(2), m, rows, all.first(5), false), ShapeError);
}

}  // namespace
}  // namespace moesaic::kernels
