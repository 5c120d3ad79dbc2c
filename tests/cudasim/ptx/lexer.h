#pragma once

#include <string_view>
#include <vector>

#include "tests/cudasim/base.h"

namespace cudasim::ptx {

/// A word (identifier, directive, opcode with its modifiers, number), a string, or one character of
/// punctuation. Views into the text given to lex().
struct Token {
  enum class Kind { Word, String, Punctuation, End };
  Kind kind = Kind::End;
  std::string_view text;
  u32 line = 0;  // of the PTX, from 1

  bool is(std::string_view t) const { return kind != Kind::String && text == t; }
};

/// Comments left out; the last token is of kind End. Throws Error on a character PTX does not have.
std::vector<Token> lex(std::string_view text);

}  // namespace cudasim::ptx
