#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "engine/decoder.h"
#include "engine/sampler.h"

namespace moesaic::engine {

/// One continuation asked for.
struct Request {
  std::vector<std::int32_t>
      prompt;                     // ids, BOS included where the model wants it; must not be empty
  int max_tokens = 128;           // -1: until stop or the end of the context
  std::vector<std::string> stop;  // texts that end it; not part of the output
  std::vector<std::int32_t> stop_ids;  // end-of-sequence ids
  SamplingOptions sampling;
};

enum class FinishReason { Stop, Length, Cancelled };

struct Completion {
  std::vector<std::int32_t> tokens;  // without the stop id
  std::string text;  // without the stop string; bytes as decoded, cut at whole UTF-8 characters
  FinishReason finish = FinishReason::Length;
  std::int64_t prompt_tokens = 0;
  double prompt_seconds = 0;  // shared passes count for every request in them
  double decode_seconds = 0;
};

/// Turns ids into text piece by piece.
using TokenToText = std::function<std::string(std::int32_t)>;

/// Called with each new piece of text of request `index`, whole UTF-8 characters only, and only
/// once no stop string can begin in it any more. Return false to cancel that request.
using OnText = std::function<bool(std::size_t index, const std::string& piece)>;

/// Runs requests, up to `n_parallel` at a time in one cache, a finished one making room for the
/// next (in order). Prompts are prefilled in pieces of at most `n_batch` tokens. Results in request
/// order. `cancel`, if given, is looked at between passes (Ctrl-C): all unfinished requests end as
/// Cancelled with what they have. Throws InputError for an empty prompt or one longer than n_ctx,
/// naming the request.
struct GenerateOptions {
  std::int64_t n_ctx =
      0;  // positions per sequence; 0: as many as the longest request needs, at most the model's
  int n_parallel = 8;
  std::int64_t n_batch = 512;
  const std::atomic<bool>* cancel = nullptr;
};
std::vector<Completion> generate(Decoder& decoder, std::span<const Request> requests,
                                 const TokenToText& to_text, const GenerateOptions& options,
                                 const OnText& on_text = {});

/// Holds back what may still become a stop string or an unfinished UTF-8 character.
class StopFilter {
 public:
  explicit StopFilter(std::vector<std::string> stops) : stops_(std::move(stops)) {}
  /// Takes a piece; returns the text that is safe to show now. After a stop was seen: returns what
  /// came before it, and stopped() is true.
  std::string push(const std::string& piece);
  /// What was held back, at the end of the stream.
  std::string flush();
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace moesaic::engine
