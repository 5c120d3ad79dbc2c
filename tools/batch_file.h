#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "engine/generation.h"
#include "models/tokenizer.h"
#include "tools/output.h"

namespace moesaic::tools {

/// How one prompt is continued: the flags of `generate`, which a line of a batch file may override.
struct PromptOptions {
  int max_tokens = 128;
  std::vector<std::string> stop;
  engine::SamplingOptions sampling;
};

/// One line of a batch file.
struct BatchItem {
  std::int64_t line = 0;                      // counted from 1
  Json id;                                    // as given, null if absent
  std::string prompt;                         // empty where messages are given
  std::vector<models::ChatMessage> messages;  // empty where a prompt is given
  PromptOptions options;
};

/// Reads a JSONL file, one object a line: `prompt` or `messages`, and any of id, max_tokens,
/// temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed, stop (a string or a
/// list). Empty lines are passed over. Throws InputError("FILE:LINE: …") for a line that is not
/// such an object, an unknown key, a wrong type or a value out of range, and for a file without a
/// line.
std::vector<BatchItem> read_batch(const std::filesystem::path& path, const PromptOptions& defaults);

}  // namespace moesaic::tools
