#include "tests/cudasim/ptx/lexer.h"

#include <cctype>

namespace cudasim::ptx {
namespace {

bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' ||
         c == '.';
}

}  // namespace

std::vector<Token> lex(std::string_view text) {
  std::vector<Token> tokens;
  u32 line = 1;
  std::size_t i = 0;
  const auto peek = [&](std::size_t k) { return i + k < text.size() ? text[i + k] : '\0'; };
  while (i < text.size()) {
    const char c = text[i];
    if (c == '\n') {
      ++line;
      ++i;
    } else if (std::isspace(static_cast<unsigned char>(c))) {
      ++i;
    } else if (c == '/' && peek(1) == '/') {
      while (i < text.size() && text[i] != '\n') ++i;
    } else if (c == '/' && peek(1) == '*') {
      const std::size_t end = std::min(text.find("*/", i + 2), text.size() - 2);
      for (; i < end; ++i) line += text[i] == '\n';
      i += 2;
    } else if (c == '"') {
      const std::size_t end = std::min(text.find('"', i + 1), text.size() - 1);
      tokens.push_back({Token::Kind::String, text.substr(i + 1, end - i - 1), line});
      i = end + 1;
    } else if (is_word(c)) {
      const std::size_t start = i;
      // "::" joins (.shared::cta), ":" ends a label.
      while (i < text.size() && (is_word(text[i]) || (text[i] == ':' && peek(1) == ':') ||
                                 (text[i] == ':' && i > start && text[i - 1] == ':'))) {
        ++i;
      }
      tokens.push_back({Token::Kind::Word, text.substr(start, i - start), line});
    } else if (std::string_view("{}()[]<>,;:+-=|@!*").find(c) != std::string_view::npos) {
      tokens.push_back({Token::Kind::Punctuation, text.substr(i, 1), line});
      ++i;
    } else {
      fail("PTX line {}: unknown character '{}'", line, c);
    }
  }
  tokens.push_back({Token::Kind::End, {}, line});
  return tokens;
}

}  // namespace cudasim::ptx
