#include "converter/kth_largest.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "kernels/base/error.h"

namespace moesaic::converter {
namespace {

struct KthLargest : testing::TestWithParam<int> {
  ThreadPool pool{GetParam()};
  Workspace workspace;
  Tally tally;
  Context ctx{pool, workspace, tally, Activations::F32};
};

TEST_P(KthLargest, IsWhatStandsThereInFallingOrder) {
  std::mt19937_64 rng(5);
  std::lognormal_distribution<float> sizes(0, 8);
  std::vector<float> values(1999);
  for (float& v : values) v = sizes(rng);
  values[3] = values[7] = std::numeric_limits<float>::infinity();
  std::fill_n(values.begin() + 20, 300, 0.0F);
  std::fill_n(values.begin() + 400, 300, 1.5F);
  values[10] = std::numeric_limits<float>::denorm_min();
  values[11] = std::numeric_limits<float>::max();
  std::vector<float> sorted = values;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  for (std::size_t k = 1; k <= values.size(); ++k) {
    ASSERT_EQ(kth_largest(ctx, values, static_cast<std::int64_t>(k)), sorted[k - 1]) << k;
  }
}

TEST_P(KthLargest, OfOneValue) { EXPECT_EQ(kth_largest(ctx, std::vector<float>{2.5F}, 1), 2.5F); }

TEST_P(KthLargest, RefusesAPlaceThatThereIsNot) {
  const std::vector<float> values = {1, 2};
  EXPECT_THROW(kth_largest(ctx, values, 0), InputError);
  EXPECT_THROW(kth_largest(ctx, values, 3), InputError);
  EXPECT_THROW(kth_largest(ctx, {}, 1), InputError);
}

INSTANTIATE_TEST_SUITE_P(Threads, KthLargest, testing::Values(1, 2, 5));

}  // namespace
}  // namespace moesaic::converter
