#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "models/gguf.h"
#include "models/gguf_writer.h"
#include "models/tokenizer.h"

/// Vocabularies small enough to read in a test, and where the real ones lie.
namespace moesaic::models::testing {

constexpr std::uint64_t kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kByte = 6;

/// Tokens of a GGUF under construction; set() what a test wants different, then open().
struct SmallVocabulary {
  std::vector<std::string> tokens;
  std::vector<std::uint64_t> types;
  std::vector<double> scores;
  std::vector<std::string> merges;
  GgufWriter writer;

  std::int32_t add(std::string token, std::uint64_t type = kNormal, double score = 0) {
    tokens.push_back(std::move(token));
    types.push_back(type);
    scores.push_back(score);
    return static_cast<std::int32_t>(tokens.size()) - 1;
  }
  /// A merge and the token it makes.
  std::int32_t add_merge(const std::string& left, const std::string& right) {
    merges.push_back(left + " " + right);
    return add(left + right);
  }

  /// Writes the file and maps it; it is unlinked at once, the mapping stays.
  std::shared_ptr<const GgufFile> open() {
    writer.set("tokenizer.ggml.tokens", GgufValue::string_array(tokens));
    writer.set("tokenizer.ggml.token_type", GgufValue::u32_array(types));
    writer.set("tokenizer.ggml.scores", GgufValue::f32_array(scores));
    writer.set("tokenizer.ggml.merges", GgufValue::string_array(merges));
    static int count = 0;
    const auto path =
        std::filesystem::temp_directory_path() / ("moesaic-vocabulary-" + std::to_string(getpid()) +
                                                  "-" + std::to_string(count++) + ".gguf");
    writer.write(path);
    auto file = GgufFile::open(path);
    std::filesystem::remove(path);
    return file;
  }
  std::unique_ptr<Tokenizer> load() { return load_tokenizer(*open()); }
};

/// GPT-2's stand-in for a byte, written down independently: what is printable stands for itself.
inline std::string byte_token(unsigned byte) {
  unsigned code = byte;
  if (byte < 0x21) {
    code = 0x100 + byte;
  } else if (byte >= 0x7F && byte <= 0xA0) {
    code = 0x121 + (byte - 0x7F);
  } else if (byte == 0xAD) {
    code = 0x143;
  }
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xC0 | (code >> 6)), static_cast<char>(0x80 | (code & 0x3F))};
}

/// Byte-level BPE: three ChatML tokens (ids 0 to 2), then the 256 bytes (id 3 + byte).
inline SmallVocabulary small_bpe() {
  SmallVocabulary v;
  v.writer.set("tokenizer.ggml.model", GgufValue::string("gpt2"));
  v.writer.set("tokenizer.ggml.pre", GgufValue::string("smollm"));
  v.writer.set("tokenizer.ggml.bos_token_id", GgufValue::u32(1));
  v.writer.set("tokenizer.ggml.eos_token_id", GgufValue::u32(2));
  for (const char* token : {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}) v.add(token, kControl);
  for (unsigned byte = 0; byte < 256; ++byte) v.add(byte_token(byte));
  return v;
}

/// SentencePiece: <unk>, <s>, </s>, <start_of_turn>, <end_of_turn> (ids 0 to 4), the bytes
/// (id 5 + byte), "▁" (261).
inline SmallVocabulary small_spm() {
  SmallVocabulary v;
  v.writer.set("tokenizer.ggml.model", GgufValue::string("llama"));
  v.writer.set("tokenizer.ggml.unknown_token_id", GgufValue::u32(0));
  v.writer.set("tokenizer.ggml.bos_token_id", GgufValue::u32(1));
  v.writer.set("tokenizer.ggml.eos_token_id", GgufValue::u32(2));
  v.writer.set("tokenizer.ggml.add_space_prefix", GgufValue::boolean(false));
  v.add("<unk>", kUnknown);
  for (const char* token : {"<s>", "</s>", "<start_of_turn>", "<end_of_turn>"}) {
    v.add(token, kControl);
  }
  constexpr const char* kHex = "0123456789ABCDEF";
  for (unsigned byte = 0; byte < 256; ++byte) {
    v.add(std::string("<0x") + kHex[byte >> 4] + kHex[byte & 15] + ">", kByte);
  }
  v.add("\u2581", kNormal, -100);
  return v;
}

inline std::string utf8(std::uint32_t code) {
  const auto tail = [&](int shift) { return static_cast<char>(0x80 | ((code >> shift) & 0x3F)); };
  if (code < 0x80) return {static_cast<char>(code)};
  if (code < 0x800) return {static_cast<char>(0xC0 | (code >> 6)), tail(0)};
  if (code < 0x10000) return {static_cast<char>(0xE0 | (code >> 12)), tail(6), tail(0)};
  return {static_cast<char>(0xF0 | (code >> 18)), tail(12), tail(6), tail(0)};
}

/// Random text of any script, with more spaces, digits and line ends than chance would give.
inline std::string random_text(std::mt19937& random, int n_characters) {
  std::string text;
  for (int i = 0; i < n_characters; ++i) {
    const unsigned kind = random() % 10;
    if (kind < 2) {
      text += " \n\t  "[random() % 5];
    } else if (kind < 6) {
      text += static_cast<char>(random() % 128);
    } else if (kind < 9) {
      text += utf8(0x80 + random() % 0x3000);
    } else {
      const std::uint32_t code = random() % 0x110000;
      text += utf8(code >= 0xD800 && code < 0xE000 ? 0xFFFD : code);
    }
  }
  return text;
}

/// A checkpoint in the cache folder.
inline std::filesystem::path checkpoint_path(const std::string& name) {
  if (const char* cache = std::getenv("MOESAIC_CACHE")) return std::filesystem::path(cache) / name;
  const char* home = std::getenv("HOME");
  return std::filesystem::path(home != nullptr ? home : "") / ".cache/moesaic" / name;
}
/// A file of the shared folder.
inline std::filesystem::path shared_path(const std::string& name) {
  if (const char* shared = std::getenv("MOESAIC_SHARED")) {
    return std::filesystem::path(shared) / name;
  }
  return std::filesystem::path(MOESAIC_SOURCE_DIR) / "../shared" / name;
}

/// The two checkpoints that ../shared/reference was computed on.
struct ReferenceModel {
  const char* name;        // in ../shared/reference
  const char* checkpoint;  // in the cache folder
};
constexpr ReferenceModel kReferenceModels[] = {{"smollm2-135m", "SmolLM2-135M-Instruct.Q4_1.gguf"},
                                               {"gemma-3-270m", "gemma-3-270m-Q4_K_M.gguf"}};

}  // namespace moesaic::models::testing
