#include "kernels/base/workspace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>

namespace moesaic {
namespace {

TEST(Workspace, SpansAreAlignedAndApart) {
  Workspace workspace;
  const Workspace::Scope scope(workspace);
  const auto a = workspace.take<char>(1);
  const auto b = workspace.take<double>(3);
  const auto c = workspace.take<float>(1 << 20);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(a.data()) % 64, 0u);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(b.data()) % 64, 0u);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(c.data()) % 64, 0u);
  a[0] = 7;
  std::fill(b.begin(), b.end(), 1.5);
  std::fill(c.begin(), c.end(), 2.5f);
  EXPECT_EQ(a[0], 7);
  EXPECT_EQ(b[2], 1.5);
}

TEST(Workspace, NothingTakenHoldsNothing) {
  Workspace workspace;
  EXPECT_EQ(workspace.capacity(), 0u);
  const Workspace::Scope scope(workspace);
  EXPECT_TRUE(workspace.take<float>(0).empty());
}

TEST(Workspace, ScopesGiveBackInOrder) {
  Workspace workspace;
  const Workspace::Scope outer(workspace);
  const auto first = workspace.take<int>(10);
  std::fill(first.begin(), first.end(), 1);
  int* inner_data = nullptr;
  {
    const Workspace::Scope inner(workspace);
    const auto second = workspace.take<int>(10);
    inner_data = second.data();
    std::fill(second.begin(), second.end(), 2);
  }
  EXPECT_EQ(workspace.take<int>(10).data(), inner_data);
  EXPECT_EQ(first[9], 1);
}

TEST(Workspace, GrowsOnTheFirstPassOnly) {
  Workspace workspace;
  const auto pass = [&] {
    const Workspace::Scope scope(workspace);
    for (std::size_t n = 1; n < (std::size_t{1} << 22); n *= 2) {
      const auto span = workspace.take<char>(n);
      span.front() = span.back() = 1;
    }
  };
  pass();
  const std::size_t capacity = workspace.capacity();
  EXPECT_GT(capacity, 0u);
  for (int i = 0; i < 5; ++i) pass();
  EXPECT_EQ(workspace.capacity(), capacity);
}

TEST(Workspace, EarlierSpansStayWhereTheyAreWhileItGrows) {
  Workspace workspace;
  const Workspace::Scope scope(workspace);
  const auto first = workspace.take<int>(100);
  std::fill(first.begin(), first.end(), 42);
  for (int i = 0; i < 20; ++i) {
    const auto more = workspace.take<int>(std::size_t{1} << 18);
    std::fill(more.begin(), more.end(), i);
  }
  EXPECT_TRUE(std::all_of(first.begin(), first.end(), [](int x) { return x == 42; }));
}

}  // namespace
}  // namespace moesaic
