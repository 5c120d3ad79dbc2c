#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <span>

#include "kernels/base/view.h"

namespace moesaic::models {

/// Parts of a layer as a file gives them back: the same bytes, the same values.
inline void expect_same(const WeightView& a, const WeightView& b) {
  EXPECT_EQ(a.rows, b.rows);
  EXPECT_EQ(a.cols, b.cols);
  ASSERT_EQ(a.empty(), b.empty());
  if (a.empty()) return;
  EXPECT_EQ(a.dtype, b.dtype);
  EXPECT_EQ(std::memcmp(a.data, b.data, static_cast<std::size_t>(a.bytes())), 0);
}

inline void expect_same(std::span<const float> a, std::span<const float> b) {
  EXPECT_TRUE(std::equal(a.begin(), a.end(), b.begin(), b.end()));
}

}  // namespace moesaic::models
