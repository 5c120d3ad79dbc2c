#include <sentencepiece_processor.h>

#include <bit>
#include <cmath>
#include <limits>
#include <set>
#include <unordered_map>

#include "kernels/base/error.h"
#include "models/vocabulary.h"

namespace moesaic::models {
namespace {

constexpr std::string_view kEscapedSpace = "\u2581";  // how SentencePiece writes a space

std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  for (std::size_t at = 0;;) {
    const std::size_t found = text.find(from, at);
    out += text.substr(at, found - at);
    if (found == std::string_view::npos) return out;
    out += to;
    at = found + from.size();
  }
}

/// Writes the protobuf wire format: Debian ships the library without the header that protoc would
/// make of sentencepiece_model.proto.
class ProtoWriter {
 public:
  void varint_field(unsigned field, std::uint64_t value) {
    varint(field << 3 | 0);
    varint(value);
  }
  void float_field(unsigned field, float value) {
    varint(field << 3 | 5);
    const auto bits = std::bit_cast<std::uint32_t>(value);
    for (int shift = 0; shift < 32; shift += 8) bytes_ += static_cast<char>(bits >> shift & 0xFF);
  }
  void bytes_field(unsigned field, std::string_view value) {
    varint(field << 3 | 2);
    varint(value.size());
    bytes_ += value;
  }
  const std::string& bytes() const { return bytes_; }

 private:
  void varint(std::uint64_t value) {
    for (; value >= 0x80; value >>= 7) bytes_ += static_cast<char>((value & 0x7F) | 0x80);
    bytes_ += static_cast<char>(value);
  }
  std::string bytes_;
};

/// Value of a byte token "<0x41>", -1 if it is not written so.
int byte_value(std::string_view token) {
  constexpr std::string_view kDigits = "0123456789ABCDEF";
  if (token.size() != 6 || token.substr(0, 3) != "<0x" || token[5] != '>') return -1;
  const std::size_t high = kDigits.find(token[3]);
  const std::size_t low = kDigits.find(token[4]);
  if (high == std::string_view::npos || low == std::string_view::npos) return -1;
  return static_cast<int>(high * 16 + low);
}

/// The bytes each token stands for.
std::vector<std::string> spm_surface(const Vocabulary& vocabulary) {
  std::vector<std::string> surface = vocabulary.tokens;
  for (std::size_t i = 0; i < surface.size(); ++i) {
    switch (vocabulary.types[i]) {
      case TokenType::Byte: {
        const int value = byte_value(surface[i]);
        require<FormatError>(value >= 0,
                             "{}: byte token {} is \"{}\", expected \"<0x00>\" to \"<0xFF>\"",
                             vocabulary.file, i, surface[i]);
        surface[i] = {static_cast<char>(value)};
        break;
      }
      case TokenType::Control:
      case TokenType::Unknown:
        break;
      default:
        surface[i] = replace_all(surface[i], kEscapedSpace, " ");
    }
  }
  return surface;
}

/// The ModelProto that SentencePiece would have stored. Field numbers are those of
/// sentencepiece_model.proto; the token types are GGUF's own.
std::string model_proto(const Vocabulary& vocabulary, const std::vector<double>& scores,
                        std::int32_t unk) {
  constexpr unsigned kModelPieces = 1, kModelTrainer = 2, kModelNormalizer = 3;
  constexpr unsigned kPieceText = 1, kPieceScore = 2, kPieceType = 3;
  constexpr unsigned kTrainerModelType = 3, kTrainerVocabSize = 4, kTrainerByteFallback = 35,
                     kTrainerUnkId = 40, kTrainerUnkPiece = 45;
  constexpr unsigned kNormalizerName = 1, kNormalizerDummyPrefix = 3, kNormalizerExtraSpaces = 4,
                     kNormalizerEscape = 5;
  constexpr std::uint64_t kModelTypeBpe = 2;

  ProtoWriter model;
  std::size_t n_bytes = 0;
  for (std::size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    TokenType type = vocabulary.types[i];
    // The library wants exactly one unknown token.
    if (type == TokenType::Unknown) type = TokenType::Control;
    if (static_cast<std::int32_t>(i) == unk) type = TokenType::Unknown;
    if (type == TokenType::Byte) ++n_bytes;
    ProtoWriter piece;
    // Converters unescape user-defined tokens ("▁▁" is "  " in the file); the library matches them
    // in escaped text.
    piece.bytes_field(kPieceText, type == TokenType::UserDefined
                                      ? replace_all(vocabulary.tokens[i], " ", kEscapedSpace)
                                      : vocabulary.tokens[i]);
    require<FormatError>(std::isfinite(scores[i]), "{}: tokenizer.ggml.scores[{}] is {}",
                         vocabulary.file, i, scores[i]);
    piece.float_field(kPieceScore, static_cast<float>(scores[i]));
    piece.varint_field(kPieceType, static_cast<std::uint64_t>(type));
    model.bytes_field(kModelPieces, piece.bytes());
  }
  require<FormatError>(n_bytes == 0 || n_bytes == 256,
                       "{}: the vocabulary has {} byte tokens, expected 256 or none",
                       vocabulary.file, n_bytes);

  ProtoWriter trainer;
  trainer.varint_field(kTrainerModelType, kModelTypeBpe);
  trainer.varint_field(kTrainerVocabSize, vocabulary.tokens.size());
  trainer.varint_field(kTrainerByteFallback, n_bytes == 256 ? 1 : 0);
  trainer.varint_field(kTrainerUnkId, static_cast<std::uint64_t>(unk));
  trainer.bytes_field(kTrainerUnkPiece, vocabulary.tokens[static_cast<std::size_t>(unk)]);
  model.bytes_field(kModelTrainer, trainer.bytes());

  ProtoWriter normalizer;
  normalizer.bytes_field(kNormalizerName, "identity");
  // encode_fragment() puts the space in front, once for all the words that it encodes.
  normalizer.varint_field(kNormalizerDummyPrefix, 0);
  normalizer.varint_field(kNormalizerExtraSpaces, 0);
  normalizer.varint_field(kNormalizerEscape, 1);
  model.bytes_field(kModelNormalizer, normalizer.bytes());
  return model.bytes();
}

/// The last character of valid UTF-8 `text`, which is not empty.
std::string_view last_character(std::string_view text) {
  std::size_t begin = text.size() - 1;
  while (begin > 0 && (static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80) --begin;
  return text.substr(begin);
}

/// Where a text can be cut in front of a space without changing its tokens: merging and matching
/// never join two characters that stand side by side in no token. Words between such places are
/// encoded once each, which takes Gemma from 2.9 s to 0.3 s of processor time for 1.3 MB.
class WordCutter {
 public:
  explicit WordCutter(const Vocabulary& vocabulary) {
    bool has_space = false;
    for (std::size_t i = 0; i < vocabulary.tokens.size(); ++i) {
      const TokenType type = vocabulary.types[i];
      has_bytes_ = has_bytes_ || type == TokenType::Byte;
      if (type != TokenType::Normal && type != TokenType::UserDefined &&
          type != TokenType::Unused) {
        continue;
      }
      const std::string token = replace_all(vocabulary.tokens[i], kEscapedSpace, " ");
      has_space = has_space || token == " ";
      for (std::size_t at = token.find(' ', 1); at != std::string::npos;
           at = token.find(' ', at + 1)) {
        joined_.emplace(last_character(std::string_view(token).substr(0, at)));
      }
    }
    // A run of unknown characters is one unknown token, so it must not be cut.
    can_cut_ = has_space || has_bytes_;
  }

  /// End of the word that begins at `begin`.
  std::size_t word_end(std::string_view text, std::size_t begin) const {
    if (!can_cut_) return text.size();
    for (std::size_t at = text.find(' ', begin + 1); at != std::string_view::npos;
         at = text.find(' ', at + 1)) {
      std::string_view before = last_character(text.substr(0, at));
      if (before == kEscapedSpace) before = " ";
      if (!joined_.contains(before)) return at;
    }
    return text.size();
  }

 private:
  std::set<std::string, std::less<>> joined_;  // characters that precede a space within some token
  bool has_bytes_ = false;
  bool can_cut_ = false;
};

class SpmTokenizer final : public VocabularyTokenizer {
 public:
  // The library matches user-defined tokens itself, in any text.
  SpmTokenizer(const Vocabulary& vocabulary, const std::vector<double>& scores, std::int32_t unk,
               bool space_prefix)
      : VocabularyTokenizer(vocabulary, spm_surface(vocabulary), {}),
        space_prefix_(space_prefix),
        cutter_(vocabulary) {
    const auto status = processor_.LoadFromSerializedProto(model_proto(vocabulary, scores, unk));
    require<FormatError>(status.ok(), "{}: the SentencePiece vocabulary does not load: {}",
                         vocabulary.file, status.message());
  }

  /// Takes back the space that encode() put before each text between special tokens.
  std::string decode(const std::vector<std::int32_t>& ids, bool with_special) const override {
    std::string out;
    bool starts_text = space_prefix_;
    for (const std::int32_t id : ids) {
      std::string bytes = piece(id, with_special);
      if (is_special(id)) {
        starts_text = space_prefix_;
      } else if (!bytes.empty()) {
        if (starts_text && bytes.front() == ' ') bytes.erase(0, 1);
        starts_text = false;
      }
      out += bytes;
    }
    return out;
  }

 protected:
  void encode_fragment(std::string_view text, std::vector<std::int32_t>& ids) const override {
    // The library counts in int, and an escaped space takes three bytes.
    require<InputError>(text.size() <= std::numeric_limits<std::int32_t>::max() / 3,
                        "text of {} bytes is too long for one call", text.size());
    std::string prefixed;
    if (space_prefix_) {
      prefixed.append(" ").append(text);
      text = prefixed;
    }
    std::unordered_map<std::string_view, std::vector<int>> words;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t end = cutter_.word_end(text, at);
      const std::string_view word = text.substr(at, end - at);
      const auto [known, is_new] = words.try_emplace(word);
      if (is_new) {
        const auto status = processor_.Encode(word, &known->second);
        require<InputError>(status.ok(), "SentencePiece cannot encode the text: {}",
                            status.message());
      }
      ids.insert(ids.end(), known->second.begin(), known->second.end());
      at = end;
    }
  }

 private:
  bool space_prefix_;
  WordCutter cutter_;
  sentencepiece::SentencePieceProcessor processor_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_spm_tokenizer(const Vocabulary& vocabulary,
                                              const std::vector<double>& scores, std::int32_t unk,
                                              bool space_prefix) {
  return std::make_unique<SpmTokenizer>(vocabulary, scores, unk, space_prefix);
}

}  // namespace moesaic::models
