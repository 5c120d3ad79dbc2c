#include "models/tokenizer.h"

#include <algorithm>
#include <array>

#include "kernels/base/error.h"
#include "models/vocabulary.h"

namespace moesaic::models {
namespace {

// Tokens that begin and end turns by name. Some converters type them as user-defined, which would
// let a user's text forge them.
constexpr std::array<std::string_view, 6> kTurnMarkers = {"<|im_start|>",  "<|im_end|>",
                                                          "<|endoftext|>", "<start_of_turn>",
                                                          "<end_of_turn>", "<|eot_id|>"};
constexpr std::array<std::string_view, 5> kStops = {"<|im_end|>", "<|endoftext|>", "<end_of_turn>",
                                                    "<|eot_id|>", "</s>"};

template <class Range, class T>
bool contains(const Range& range, const T& value) {
  return std::find(std::begin(range), std::end(range), value) != std::end(range);
}

Vocabulary read_vocabulary(const GgufFile& file) {
  Vocabulary vocabulary{file.path().string(), file.get_strings("tokenizer.ggml.tokens"), {}};
  const std::size_t n = vocabulary.tokens.size();
  require<FormatError>(n > 0, "{}: tokenizer.ggml.tokens is empty", vocabulary.file);
  vocabulary.types.assign(n, TokenType::Normal);
  if (file.find("tokenizer.ggml.token_type") != nullptr) {
    const auto types = file.get_ints("tokenizer.ggml.token_type");
    require<FormatError>(types.size() == n,
                         "{}: tokenizer.ggml.token_type has {} entries, expected {}, one per token",
                         vocabulary.file, types.size(), n);
    for (std::size_t i = 0; i < n; ++i) {
      require<FormatError>(types[i] >= 1 && types[i] <= 6,
                           "{}: tokenizer.ggml.token_type[{}] is {}, expected 1 to 6",
                           vocabulary.file, i, types[i]);
      vocabulary.types[i] = static_cast<TokenType>(types[i]);
      if (vocabulary.types[i] == TokenType::UserDefined &&
          contains(kTurnMarkers, vocabulary.tokens[i])) {
        vocabulary.types[i] = TokenType::Control;
      }
    }
  }
  return vocabulary;
}

std::optional<std::int32_t> read_id(const GgufFile& file, const Vocabulary& vocabulary,
                                    std::string_view key) {
  if (file.find(key) == nullptr) return std::nullopt;
  const std::int64_t id = file.get_int(key);
  require<FormatError>(id >= 0 && id < static_cast<std::int64_t>(vocabulary.tokens.size()),
                       "{}: {} is {}, expected less than the {} tokens of the vocabulary",
                       vocabulary.file, key, id, vocabulary.tokens.size());
  return static_cast<std::int32_t>(id);
}

std::int32_t read_unknown(const GgufFile& file, const Vocabulary& vocabulary) {
  if (const auto id = read_id(file, vocabulary, "tokenizer.ggml.unknown_token_id")) return *id;
  const auto found =
      std::find(vocabulary.types.begin(), vocabulary.types.end(), TokenType::Unknown);
  require<FormatError>(
      found != vocabulary.types.end(),
      "{}: tokenizer.ggml.unknown_token_id is missing and no token has the unknown type",
      vocabulary.file);
  return static_cast<std::int32_t>(found - vocabulary.types.begin());
}

std::unique_ptr<Tokenizer> make_spm(const GgufFile& file, const Vocabulary& vocabulary) {
  const auto scores = file.get_floats("tokenizer.ggml.scores");
  require<FormatError>(scores.size() == vocabulary.tokens.size(),
                       "{}: tokenizer.ggml.scores has {} entries, expected {}, one per token",
                       vocabulary.file, scores.size(), vocabulary.tokens.size());
  // Without types the byte and control tokens would be words like any other.
  require<FormatError>(file.find("tokenizer.ggml.token_type") != nullptr,
                       "{}: metadata key tokenizer.ggml.token_type is missing", vocabulary.file);
  return make_spm_tokenizer(vocabulary, scores, read_unknown(file, vocabulary),
                            file.get_bool("tokenizer.ggml.add_space_prefix", true));
}

}  // namespace

std::string Tokenizer::decode(const std::vector<std::int32_t>& ids, bool with_special) const {
  std::string out;
  for (const std::int32_t id : ids) out += piece(id, with_special);
  return out;
}

std::unique_ptr<Tokenizer> load_tokenizer(const GgufFile& file) {
  const std::string model = file.get_string("tokenizer.ggml.model");
  const bool spm = model == "llama";
  require<FormatError>(spm || model == "gpt2",
                       "{}: tokenizer.ggml.model is \"{}\", expected one of gpt2, llama",
                       file.path().string(), model);
  const Vocabulary vocabulary = read_vocabulary(file);
  std::unique_ptr<Tokenizer> tokenizer =
      spm ? make_spm(file, vocabulary)
          // A file that names no pre-tokenizer gets GPT-2's, the default of byte-level tokenizers.
          : make_bpe_tokenizer(vocabulary, file.get_strings("tokenizer.ggml.merges"),
                               file.get_string("tokenizer.ggml.pre", "default"));

  tokenizer->bos = read_id(file, vocabulary, "tokenizer.ggml.bos_token_id");
  tokenizer->eos = read_id(file, vocabulary, "tokenizer.ggml.eos_token_id");
  // SentencePiece models were trained behind a BOS, byte-level ones mostly not.
  tokenizer->add_bos =
      file.get_bool("tokenizer.ggml.add_bos_token", spm && tokenizer->bos.has_value());
  require<FormatError>(
      !tokenizer->add_bos || tokenizer->bos,
      "{}: tokenizer.ggml.add_bos_token is true, but tokenizer.ggml.bos_token_id is missing",
      vocabulary.file);

  std::vector<std::int32_t>& stops = tokenizer->stop_ids;
  const auto add_stop = [&](std::optional<std::int32_t> id) {
    if (id && !contains(stops, *id)) stops.push_back(*id);
  };
  add_stop(tokenizer->eos);
  add_stop(read_id(file, vocabulary, "tokenizer.ggml.eot_token_id"));
  for (std::size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    if (vocabulary.types[i] == TokenType::Control && contains(kStops, vocabulary.tokens[i])) {
      add_stop(static_cast<std::int32_t>(i));
    }
  }
  return tokenizer;
}

}  // namespace moesaic::models
