// Block scales as parameters: codes and values of each format, gradients by the chain rule's own
// sums, and back into bytes.

#include "converter/recovery/block_scales.h"

#include <cmath>
#include <cstring>
#include <random>

#include "kernels/base/error.h"
#include "kernels/quant.h"
#include "tests/converter/recovery/gradient_check.h"

namespace moesaic::converter {
namespace {

constexpr std::int64_t kRows = 5, kCols = 96;

class BlockScalesOf : public testing::TestWithParam<DType> {
 protected:
  BlockScalesOf() {
    std::mt19937 rng(7);
    std::normal_distribution<float> normal;
    std::vector<float> row(kCols);
    bytes_.resize(static_cast<std::size_t>(kRows * row_bytes(GetParam(), kCols)));
    for (std::int64_t r = 0; r < kRows; ++r) {
      for (float& v : row) v = 0.3F + normal(rng);
      kernels::quantize_row(GetParam(), row, bytes_.data() + r * row_bytes(GetParam(), kCols));
    }
  }
  WeightView view() const { return {bytes_.data(), GetParam(), kRows, kCols, nullptr}; }
  std::vector<float> values(const std::byte* from) const {
    std::vector<float> all(kRows * kCols);
    for (std::int64_t r = 0; r < kRows; ++r) {
      kernels::dequantize_row(GetParam(), from + r * row_bytes(GetParam(), kCols),
                              std::span(all).subspan(static_cast<std::size_t>(r * kCols), kCols));
    }
    return all;
  }
  std::vector<std::byte> bytes_;
  Lent lent_;
};

TEST_P(BlockScalesOf, UntouchedTheyGiveTheFileBack) {
  const BlockScales scales(view());
  std::vector<float> w(kRows * kCols, -1);
  scales.scatter(lent_.ctx, {w.data(), kRows, kCols});
  EXPECT_EQ(w, values(bytes_.data()));
  const auto packed = scales.packed();
  ASSERT_EQ(packed.size(), bytes_.size());
  EXPECT_EQ(std::memcmp(packed.data(), bytes_.data(), bytes_.size()), 0);
}

// L = Σ a_i w_i + ½ w_i² is a parabola in each scale, so that central differences are exact but for
// rounding.
TEST_P(BlockScalesOf, GradientsAreThoseOfDifferences) {
  BlockScales scales(view());
  std::vector<float> w(kRows * kCols), g(w.size()), a(w.size());
  std::mt19937 rng(3);
  for (float& v : a) v = std::normal_distribution<float>()(rng);
  const auto loss = [&] {
    scales.scatter(lent_.ctx, {w.data(), kRows, kCols});
    double sum = 0;
    for (std::size_t i = 0; i < w.size(); ++i) {
      sum += static_cast<double>(a[i]) * w[i] + 0.5 * static_cast<double>(w[i]) * w[i];
    }
    return sum;
  };
  loss();
  for (std::size_t i = 0; i < w.size(); ++i) g[i] = a[i] + w[i];
  scales.gather(lent_.ctx, {g.data(), kRows, kCols});
  const auto check = [&](std::span<float> value, std::span<float> gradient) {
    ASSERT_EQ(value.size(), gradient.size());
    for (const std::size_t i : {std::size_t{0}, std::size_t{4}, value.size() - 1}) {
      const float at = value[i];
      const float step = std::max(1e-3F, 0.05F * std::abs(at));
      value[i] = at + step;
      const double above = loss();
      const double up = value[i];
      value[i] = at - step;
      const double slope = (above - loss()) / (up - static_cast<double>(value[i]));
      value[i] = at;
      EXPECT_NEAR(gradient[i], slope, 1e-3 * (1 + std::abs(slope))) << i;
    }
  };
  check(scales.scale(), scales.scale_gradient());
  if (!scales.offset().empty()) check(scales.offset(), scales.offset_gradient());
}

TEST_P(BlockScalesOf, PackedHoldsTheNewScalesInHalfPrecision) {
  BlockScales scales(view());
  for (float& s : scales.scale()) s *= 1.25F;
  for (float& o : scales.offset()) o -= 0.125F;
  std::vector<float> w(kRows * kCols);
  scales.scatter(lent_.ctx, {w.data(), kRows, kCols});
  const auto packed = scales.packed();
  const std::vector<float> held = values(packed.data());
  for (std::size_t i = 0; i < w.size(); ++i) {
    // Half a unit in the last of ten places of the scale and the offset.
    EXPECT_NEAR(held[i], w[i], 6.0 / 1024) << i;
  }
  EXPECT_NE(held, values(bytes_.data()));
}

INSTANTIATE_TEST_SUITE_P(Formats, BlockScalesOf,
                         testing::Values(DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1,
                                         DType::Q8_0),
                         [](const auto& info) { return std::string(traits(info.param).name); });

TEST(BlockScales, OtherFormatsHaveNone) {
  for (const DType dtype : {DType::F32, DType::F16, DType::BF16, DType::Q4_K, DType::Q6_K}) {
    EXPECT_FALSE(BlockScales::can_tune(dtype)) << traits(dtype).name;
  }
  const std::vector<std::byte> bytes(256);
  EXPECT_THROW(BlockScales({bytes.data(), DType::BF16, 1, 32, nullptr}), ShapeError);
}

}  // namespace
}  // namespace moesaic::converter
