#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "engine/generation.h"

namespace moesaic::engine {
namespace {

// The text in pieces of n bytes through a filter.
std::string filtered(const std::string& text, std::size_t n, const std::vector<std::string>& stops,
                     bool* stopped = nullptr) {
  StopFilter filter(stops);
  std::string out;
  for (std::size_t i = 0; i < text.size(); i += n) out += filter.push(text.substr(i, n));
  out += filter.flush();
  if (stopped != nullptr) *stopped = filter.stopped();
  return out;
}

TEST(StopFilter, FindsAStopAcrossPieces) {
  for (std::size_t n = 1; n < 20; ++n) {
    bool stopped = false;
    EXPECT_EQ(filtered("one two STOP three", n, {"STOP"}, &stopped), "one two ") << n;
    EXPECT_TRUE(stopped);
  }
}

TEST(StopFilter, EarliestOfSeveralWins) {
  for (std::size_t n = 1; n < 12; ++n) {
    EXPECT_EQ(filtered("abcdefgh", n, {"gh", "de"}), "abc") << n;
  }
}

TEST(StopFilter, FalseStartsAreReleased) {
  for (std::size_t n = 1; n < 12; ++n) {
    bool stopped = true;
    EXPECT_EQ(filtered("STO STST", n, {"STOP"}, &stopped), "STO STST") << n;
    EXPECT_FALSE(stopped);
  }
}

TEST(StopFilter, SelfOverlappingStop) {
  for (std::size_t n = 1; n < 8; ++n) EXPECT_EQ(filtered("aaab", n, {"aab"}), "a") << n;
}

TEST(StopFilter, HoldsBackOnlyWhatMayBecomeAStop) {
  StopFilter filter({"\n\n"});
  EXPECT_EQ(filter.push("a"), "a");
  EXPECT_EQ(filter.push("b\n"), "b");
  EXPECT_EQ(filter.push("c"), "\nc");
  EXPECT_EQ(filter.push("\n"), "");
  EXPECT_EQ(filter.push("\nd"), "");
  EXPECT_TRUE(filter.stopped());
  EXPECT_EQ(filter.push("e"), "");
  EXPECT_EQ(filter.flush(), "");
}

TEST(StopFilter, CharactersComeWhole) {
  StopFilter filter({});
  EXPECT_EQ(filter.push("\xF0"), "");
  EXPECT_EQ(filter.push("\x9F\x98"), "");
  EXPECT_EQ(filter.push("\x80!"), "😀!");
}

TEST(StopFilter, InvalidBytesBecomeReplacementCharacters) {
  EXPECT_EQ(filtered("a\xFF\xE2\x82", 1, {}), "a\xEF\xBF\xBD\xEF\xBF\xBD");
  EXPECT_EQ(filtered("\xE2\x82 STOP", 1, {"STOP"}), "\xEF\xBF\xBD ");
}

TEST(StopFilter, StopInsideCharactersAndMultibyteStops) {
  for (std::size_t n = 1; n < 12; ++n) {
    EXPECT_EQ(filtered("é–€–x", n, {"€"}), "é–") << n;
    EXPECT_EQ(filtered("é–", n, {"€"}), "é–") << n;
  }
}

}  // namespace
}  // namespace moesaic::engine
