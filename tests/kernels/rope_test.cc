#include "kernels/rope.h"

#include "kernels/base/error.h"
#include "tests/kernels/support.h"
#include "tests/reference/ops.h"

namespace moesaic {
namespace {

using kernels::RopeStyle;

class Rope : public OnEachTarget {};

// cos and sin are off by ε/2 of themselves, each product and the sum by another: 2ε of the pair's
// length covers them.
void check(int threads, std::int64_t rows, int n_heads, int head_dim, RopeStyle style,
           std::int32_t first_position, std::int32_t step) {
  Lender lender(threads);
  const std::int64_t d = std::int64_t{n_heads} * head_dim;
  auto x = normal_values(size(rows * d), 1);
  const auto before = x;
  std::vector<std::int32_t> positions;
  for (std::int64_t t = 0; t < rows; ++t) {
    positions.push_back(first_position + static_cast<std::int32_t>(t) * step);
  }
  const auto freq = kernels::rope_frequencies(head_dim, 10000);
  const auto expected = reference::rope({before.data(), rows, d}, head_dim, positions, freq, style);
  kernels::rope(lender.ctx, {x.data(), rows, d}, head_dim, positions, freq, style);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const std::size_t head = i / static_cast<std::size_t>(head_dim) * size(head_dim);
    const std::size_t in_head = i - head;
    const std::size_t partner =
        head + (style == RopeStyle::Interleaved ? in_head ^ 1
                                                : (in_head + size(head_dim / 2)) % size(head_dim));
    const double length = std::hypot(double{before[i]}, double{before[partner]});
    ASSERT_NEAR(x[i], expected[i], 2 * kEps * length)
        << "element " << i << " head_dim " << head_dim << " rows " << rows;
  }
}

TEST_P(Rope, MatchesTheReference) {
  for (const RopeStyle style : {RopeStyle::Interleaved, RopeStyle::Halves}) {
    for (const int head_dim : {2, 6, 20, 64, 80, 256}) {
      check(1, 1, 3, head_dim, style, 17, 1);
      check(2, 40, 9, head_dim, style, 0, 1);
    }
  }
}

TEST_P(Rope, FarPositions) {
  for (const RopeStyle style : {RopeStyle::Interleaved, RopeStyle::Halves}) {
    check(1, 64, 1, 64, style, 32768 - 64, 1);
    check(1, 64, 1, 64, style, 0, 524287);
  }
}

TEST_P(Rope, PositionZeroChangesNothing) {
  Lender lender;
  auto x = normal_values(64, 2);
  const auto before = x;
  const std::vector<std::int32_t> positions = {0};
  kernels::rope(lender.ctx, {x.data(), 1, 64}, 32, positions, kernels::rope_frequencies(32, 1e6),
                RopeStyle::Halves);
  EXPECT_EQ(x, before);
}

TEST_P(Rope, QuarterTurns) {
  Lender lender;
  // Angles of 0 to 63 quarter turns, in float32.
  std::vector<float> freq(64);
  for (std::size_t i = 0; i < freq.size(); ++i) freq[i] = static_cast<float>(i) * 1.5707964f;
  std::vector<float> x(128, 0.0f);
  for (std::size_t i = 0; i < 128; i += 2) x[i] = 1.0f;
  const auto before = x;
  const std::vector<std::int32_t> positions = {1};
  kernels::rope(lender.ctx, {x.data(), 1, 128}, 128, positions, freq, RopeStyle::Interleaved);
  const auto expected =
      reference::rope({before.data(), 1, 128}, 128, positions, freq, RopeStyle::Interleaved);
  for (std::size_t i = 0; i < 128; ++i) {
    // Near a zero of cos or sin it is the relative error that tells a sloppy reduction.
    EXPECT_NEAR(x[i], expected[i], kEps * std::abs(expected[i])) << i;
  }
}

TEST_P(Rope, EmptyBatch) {
  Lender lender;
  EXPECT_NO_THROW(kernels::rope(lender.ctx, {nullptr, 0, 64}, 64, {},
                                kernels::rope_frequencies(64, 10000), RopeStyle::Halves));
}

INSTANTIATE_TEST_SUITE_P(Targets, Rope, every_target(), target_name);

TEST(RopeFrequencies, FallFromOneToNearlyOneOverBase) {
  const auto freq = kernels::rope_frequencies(8, 10000);
  ASSERT_EQ(freq.size(), 4u);
  EXPECT_EQ(freq[0], 1.0f);
  EXPECT_EQ(freq[1], 0.1f);
  EXPECT_EQ(freq[2], 0.01f);
  EXPECT_EQ(freq[3], 0.001f);
}

TEST(RopeErrors, NamesTheSizes) {
  Lender lender;
  std::vector<float> x(64);
  const std::vector<std::int32_t> positions = {1};
  const auto freq = kernels::rope_frequencies(32, 10000);
  const auto call = [&](std::int64_t d, int head_dim, std::size_t n_freq, std::size_t n_positions) {
    kernels::rope(lender.ctx, {x.data(), 1, d}, head_dim, std::span(positions).first(n_positions),
                  std::span(freq).first(n_freq), RopeStyle::Halves);
  };
  EXPECT_NO_THROW(call(64, 32, 16, 1));
  EXPECT_THROW(call(64, 31, 15, 1), ShapeError);
  EXPECT_THROW(call(64, 0, 0, 1), ShapeError);
  EXPECT_THROW(call(60, 32, 16, 1), ShapeError);
  EXPECT_THROW(call(64, 32, 15, 1), ShapeError);
  EXPECT_THROW(call(64, 32, 16, 0), ShapeError);
}

}  // namespace
}  // namespace moesaic
