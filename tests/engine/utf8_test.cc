#include "engine/utf8.h"

#include <gtest/gtest.h>

namespace moesaic::engine {
namespace {

using Kind = Utf8Front::Kind;

void expect_front(std::string_view bytes, Kind kind, std::size_t length) {
  const Utf8Front front = utf8_front(bytes);
  EXPECT_EQ(front.kind, kind) << bytes;
  EXPECT_EQ(front.length, length) << bytes;
}

TEST(Utf8, FrontOfEveryLength) {
  expect_front("a", Kind::Whole, 1);
  expect_front("é!", Kind::Whole, 2);
  expect_front("€", Kind::Whole, 3);
  expect_front("😀", Kind::Whole, 4);
  expect_front("\xF0\x9F\x98", Kind::Partial, 3);
  expect_front("\xE2", Kind::Partial, 1);
}

TEST(Utf8, WhatNoCharacterBeginsWith) {
  expect_front("\x80", Kind::Invalid, 1);              // continuation alone
  expect_front("\xC0\x80", Kind::Invalid, 1);          // overlong
  expect_front("\xE0\x80\x80", Kind::Invalid, 1);      // overlong
  expect_front("\xED\xA0\x80", Kind::Invalid, 1);      // surrogate
  expect_front("\xF4\x90\x80\x80", Kind::Invalid, 1);  // above U+10FFFF
  expect_front("\xFF", Kind::Invalid, 1);
  expect_front("\xE2\x82x", Kind::Invalid, 2);
}

TEST(Utf8, PartialSuffix) {
  EXPECT_EQ(utf8_partial_suffix(""), 0U);
  EXPECT_EQ(utf8_partial_suffix("ab"), 0U);
  EXPECT_EQ(utf8_partial_suffix("a€"), 0U);
  EXPECT_EQ(utf8_partial_suffix("a\xE2\x82"), 2U);
  EXPECT_EQ(utf8_partial_suffix("\xE2\xE2\x82"), 2U);
  EXPECT_EQ(utf8_partial_suffix("€\xF0\x9F\x98"), 3U);
  EXPECT_EQ(utf8_partial_suffix("\x80"), 0U);
}

TEST(Utf8, RepairKeepsCharactersAndMarksTheRest) {
  EXPECT_EQ(utf8_repaired("aé€😀"), "aé€😀");
  EXPECT_EQ(utf8_repaired("a\x80z"), "a\xEF\xBF\xBDz");
  EXPECT_EQ(utf8_repaired("\xE2\x82z"), "\xEF\xBF\xBDz");
  EXPECT_EQ(utf8_repaired("z\xF0\x9F"), "z\xEF\xBF\xBD");
  EXPECT_EQ(utf8_repaired(""), "");
}

}  // namespace
}  // namespace moesaic::engine
