#include "models/vocabulary.h"

#include <algorithm>

#include "kernels/base/error.h"

namespace moesaic::models {

SpecialMatcher::SpecialMatcher(std::vector<std::pair<std::string, std::int32_t>> strings)
    : strings_(std::move(strings)) {
  std::erase_if(strings_, [](const auto& entry) { return entry.first.empty(); });
  std::sort(strings_.begin(), strings_.end());
  for (const auto& [text, id] : strings_) starts_[static_cast<unsigned char>(text[0])] = true;
}

std::optional<SpecialMatcher::Match> SpecialMatcher::find(std::string_view text,
                                                          std::size_t from) const {
  for (std::size_t begin = from; begin < text.size(); ++begin) {
    if (!starts_[static_cast<unsigned char>(text[begin])]) continue;
    // The sorted strings that share the text's first `depth` bytes are a range; narrow it byte by
    // byte. A string that ends where the range stands is the first in it.
    auto low = strings_.begin();
    auto high = strings_.end();
    std::optional<Match> best;
    for (std::size_t depth = 0; begin + depth < text.size(); ++depth) {
      const auto wanted = static_cast<unsigned char>(text[begin + depth]);
      const auto byte = [depth](const auto& entry) {
        return entry.first.size() > depth ? static_cast<unsigned char>(entry.first[depth]) : -1;
      };
      low = std::partition_point(low, high, [&](const auto& e) { return byte(e) < wanted; });
      high = std::partition_point(low, high, [&](const auto& e) { return byte(e) == wanted; });
      if (low == high) break;
      if (low->first.size() == depth + 1) best = Match{begin, depth + 1, low->second};
    }
    if (best) return best;
  }
  return std::nullopt;
}

VocabularyTokenizer::VocabularyTokenizer(const Vocabulary& vocabulary,
                                         std::vector<std::string> surface,
                                         const std::vector<TokenType>& everywhere)
    : surface_(std::move(surface)), special_(vocabulary.tokens.size()) {
  std::vector<std::pair<std::string, std::int32_t>> in_text;
  std::vector<std::pair<std::string, std::int32_t>> in_parsed;
  for (std::size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    const TokenType type = vocabulary.types[i];
    special_[i] = type == TokenType::Control || type == TokenType::Unknown;
    const bool always = std::find(everywhere.begin(), everywhere.end(), type) != everywhere.end();
    const auto id = static_cast<std::int32_t>(i);
    if (always) in_text.emplace_back(vocabulary.tokens[i], id);
    if (always || special_[i]) in_parsed.emplace_back(vocabulary.tokens[i], id);
  }
  in_text_ = SpecialMatcher(std::move(in_text));
  in_parsed_ = SpecialMatcher(std::move(in_parsed));
}

std::vector<std::int32_t> VocabularyTokenizer::encode(std::string_view text,
                                                      SpecialTokens special) const {
  check_utf8(text, "text");
  const SpecialMatcher& matcher = special == SpecialTokens::Parse ? in_parsed_ : in_text_;
  std::vector<std::int32_t> ids;
  for (std::size_t at = 0; at < text.size();) {
    const auto match = matcher.find(text, at);
    const std::size_t end = match ? match->begin : text.size();
    if (end > at) encode_fragment(text.substr(at, end - at), ids);
    at = end;
    if (match) {
      ids.push_back(match->id);
      at += match->length;
    }
  }
  return ids;
}

std::string VocabularyTokenizer::piece(std::int32_t id, bool with_special) const {
  require<InputError>(id >= 0 && id < vocab_size(),
                      "token id {} is outside the vocabulary of {} tokens", id, vocab_size());
  if (is_special(id) && !with_special) return {};
  return surface_[static_cast<std::size_t>(id)];
}

}  // namespace moesaic::models
