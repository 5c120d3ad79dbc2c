#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/base/context.h"
#include "kernels/base/view.h"
#include "kernels/cpu/target.h"

namespace moesaic {

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
inline constexpr double kEps = std::numeric_limits<float>::epsilon();

/// Everything a kernel call borrows.
struct Lender {
  explicit Lender(int n_threads = 1) : pool(n_threads) {}
  ThreadPool pool;
  Workspace workspace;
  Tally tally;
  Context ctx{pool, workspace, tally};
};

/// Normally distributed, the same in every run.
inline std::vector<float> normal_values(std::size_t n, unsigned seed, float scale = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> v(n);
  for (float& x : v) x = normal(random);
  return v;
}

inline std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

/// Base of a suite that runs with every instruction set of this machine.
class OnEachTarget : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { kernels::use_simd_target(GetParam()); }
  void TearDown() override { kernels::use_simd_target(""); }
};

/// For INSTANTIATE_TEST_SUITE_P(Targets, SUITE, every_target(), target_name).
inline auto every_target() {
  const auto names = kernels::simd_targets();
  return testing::ValuesIn(std::vector<std::string>(names.begin(), names.end()));
}
inline std::string target_name(const testing::TestParamInfo<std::string>& info) {
  return info.param;
}

}  // namespace moesaic
