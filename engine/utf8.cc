#include "engine/utf8.h"

#include <algorithm>

namespace moesaic::engine {

Utf8Front utf8_front(std::string_view bytes) {
  using Kind = Utf8Front::Kind;
  const auto at = [&](std::size_t i) { return static_cast<unsigned char>(bytes[i]); };
  const unsigned char lead = at(0);
  if (lead < 0x80) return {Kind::Whole, 1};
  std::size_t length = 0;
  unsigned char low = 0x80;  // bounds of the second byte, which rule out overlong forms, surrogates
  unsigned char high = 0xBF;  // and values above U+10FFFF
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return {Kind::Invalid, 1};
  }
  for (std::size_t i = 1; i < length; ++i) {
    if (i == bytes.size()) return {Kind::Partial, i};
    if (at(i) < low || at(i) > high) return {Kind::Invalid, i};
    low = 0x80;
    high = 0xBF;
  }
  return {Kind::Whole, length};
}

std::size_t utf8_partial_suffix(std::string_view bytes) {
  for (std::size_t n = std::min<std::size_t>(3, bytes.size()); n > 0; --n) {
    const Utf8Front front = utf8_front(bytes.substr(bytes.size() - n));
    if (front.kind == Utf8Front::Kind::Partial) return n;
  }
  return 0;
}

std::string utf8_repaired(std::string_view bytes) {
  std::string text;
  text.reserve(bytes.size());
  while (!bytes.empty()) {
    const Utf8Front front = utf8_front(bytes);
    if (front.kind == Utf8Front::Kind::Whole) {
      text.append(bytes.substr(0, front.length));
    } else {
      text.append("\xEF\xBF\xBD");
    }
    bytes.remove_prefix(front.length);
  }
  return text;
}

}  // namespace moesaic::engine
