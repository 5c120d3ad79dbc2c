#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "models/tokenizer.h"

namespace moesaic::models {

/// What a token is; the numbers are those of tokenizer.ggml.token_type.
enum class TokenType : std::uint8_t {
  Normal = 1,
  Unknown = 2,
  Control = 3,
  UserDefined = 4,  // matched in any text before the algorithm sees it
  Unused = 5,
  Byte = 6,  // "<0x41>"
};

/// The token list of a file, checked by load_tokenizer: scores and types are as long as tokens.
struct Vocabulary {
  std::string file;                 // for messages
  std::vector<std::string> tokens;  // [vocab_size], as the file spells them
  std::vector<TokenType> types;     // [vocab_size]
};

/// Finds the leftmost, and there the longest, of a set of strings. Takes time linear in the text
/// (times the length of the longest string) however many strings there are.
class SpecialMatcher {
 public:
  struct Match {
    std::size_t begin;
    std::size_t length;
    std::int32_t id;
  };

  SpecialMatcher() = default;
  /// Empty strings never match; of equal ones the lowest id does.
  explicit SpecialMatcher(std::vector<std::pair<std::string, std::int32_t>> strings);
  /// The first match that begins at byte `from` or later.
  std::optional<Match> find(std::string_view text, std::size_t from) const;

 private:
  std::vector<std::pair<std::string, std::int32_t>> strings_;  // sorted
  std::array<bool, 256> starts_{};                             // [first byte]
};

/// What both kinds of tokenizer share: the UTF-8 check, cutting the text at special tokens, and the
/// bytes that each token stands for.
class VocabularyTokenizer : public Tokenizer {
 public:
  std::vector<std::int32_t> encode(std::string_view text, SpecialTokens special) const final;
  std::string piece(std::int32_t id, bool with_special) const final;
  std::int64_t vocab_size() const final { return static_cast<std::int64_t>(surface_.size()); }

 protected:
  /// `surface`: bytes of each token. `everywhere`: token types to cut out of any text; control and
  /// unknown tokens are cut out as well where special tokens are parsed.
  VocabularyTokenizer(const Vocabulary& vocabulary, std::vector<std::string> surface,
                      const std::vector<TokenType>& everywhere);
  /// Appends the ids of a text (not empty, valid UTF-8) in which no special token is left.
  virtual void encode_fragment(std::string_view text, std::vector<std::int32_t>& ids) const = 0;
  bool is_special(std::int32_t id) const { return special_[static_cast<std::size_t>(id)]; }

 private:
  std::vector<std::string> surface_;  // [vocab_size]
  std::vector<bool> special_;         // [vocab_size] control or unknown
  SpecialMatcher in_text_;            // where special tokens are text
  SpecialMatcher in_parsed_;          // where they are parsed
};

/// Byte-level BPE: the text is cut by the pre-tokenizer's regular expressions, each piece becomes
/// GPT-2's 256 printable stand-ins for bytes, and neighbours merge, the lowest rank first, the
/// leftmost of equals. `merges`: "left right" in the order of rank. A byte that has no token (the
/// vocabulary of SmolLM2 lacks six control characters and the lead bytes F1, F2) is left out, as in
/// Hugging Face's and llama.cpp's tokenizers. Throws FormatError: unknown `pre` (lists the known
/// ones), a merge that is not two tokens of the vocabulary or makes none.
std::unique_ptr<Tokenizer> make_bpe_tokenizer(const Vocabulary& vocabulary,
                                              const std::vector<std::string>& merges,
                                              std::string_view pre);

/// SentencePiece BPE with byte fallback, by the sentencepiece library. `scores` [vocab_size]; `unk`
/// the token for what cannot be said; `space_prefix`: a space is put before each text, and taken
/// away by decode(). U+2581 in a text is a space to SentencePiece and comes back as one. Throws
/// FormatError: some byte tokens but not all 256, or whatever the library finds wrong.
std::unique_ptr<Tokenizer> make_spm_tokenizer(const Vocabulary& vocabulary,
                                              const std::vector<double>& scores, std::int32_t unk,
                                              bool space_prefix);

}  // namespace moesaic::models
