#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace moesaic::engine {

/// What stands at the front of some bytes, read as UTF-8 (RFC 3629: no overlong forms, no
/// surrogates, at most U+10FFFF).
struct Utf8Front {
  enum class Kind {
    Whole,    // a character of `length` bytes
    Partial,  // the first `length` bytes, all there are, of a character that more bytes may
              // complete
    Invalid,  // `length` bytes that begin no character
  };
  Kind kind;
  std::size_t length;
};

/// `bytes` must not be empty.
Utf8Front utf8_front(std::string_view bytes);

/// How many bytes at the end of `bytes` are the unfinished beginning of a character (0 to 3).
std::size_t utf8_partial_suffix(std::string_view bytes);

/// The text with each run of bytes that is no character, or an unfinished one, replaced by U+FFFD
/// (one per longest beginning of a character, as Unicode recommends).
std::string utf8_repaired(std::string_view bytes);

}  // namespace moesaic::engine
