#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "models/gguf.h"

namespace moesaic::models {

/// What becomes of the text of a special token ("<|im_end|>") inside the text to encode.
enum class SpecialTokens {
  Parse,  // it becomes the token: templates, `tokenize`
  Text,   // it is text like any other: what a user typed
};

/// Text ↔ ids. Thread-safe once made.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  /// Ids without BOS or EOS. Throws InputError("… not UTF-8 at byte N") for text that is not UTF-8.
  virtual std::vector<std::int32_t> encode(std::string_view text, SpecialTokens special) const = 0;
  /// The bytes a token stands for, special tokens as nothing unless `with_special`.
  virtual std::string piece(std::int32_t id, bool with_special = false) const = 0;
  virtual std::int64_t vocab_size() const = 0;

  /// The text of a whole sequence: the pieces, less the space that some models put in front.
  virtual std::string decode(const std::vector<std::int32_t>& ids, bool with_special = false) const;

  // Shared by all kinds, read from the file.
  std::optional<std::int32_t> bos;
  std::optional<std::int32_t> eos;
  bool add_bos = false;                // the model wants BOS in front of a text
  std::vector<std::int32_t> stop_ids;  // eos and end-of-turn tokens: generation ends there
};

/// Byte-level BPE (tokenizer.ggml.model "gpt2") or SentencePiece ("llama"), from a GGUF's metadata.
/// Throws FormatError naming the file and what is unknown.
std::unique_ptr<Tokenizer> load_tokenizer(const GgufFile& file);

/// One message of a chat.
struct ChatMessage {
  std::string role;  // system, user, assistant
  std::string content;
};

/// Ids of a chat up to where the assistant answers, by the model's own template family (ChatML,
/// Gemma), BOS included where wanted. Roles and markers are parsed as special tokens; contents are
/// text. Throws InputError if the file has no template that is known, or a role is unknown.
std::vector<std::int32_t> encode_chat(const GgufFile& file, const Tokenizer& tokenizer,
                                      const std::vector<ChatMessage>& messages);

/// Throws InputError("WHAT: not UTF-8 at byte N") unless the text is valid UTF-8.
void check_utf8(std::string_view text, std::string_view what);

}  // namespace moesaic::models
