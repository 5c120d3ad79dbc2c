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
  std::vector<std::int32_t> prompt;    // ids, BOS included where the model wants it; not empty
  int max_tokens = 128;                // -1: until stop or the end of the context
  std::vector<std::string> stop;       // texts that end it; not part of the output
  std::vector<std::int32_t> stop_ids;  // end-of-sequence ids
  SamplingOptions sampling;
};

enum class FinishReason { Stop, Length, Cancelled };

struct Completion {
  std::vector<std::int32_t> tokens;  // without the stop id; those that spell a stop string included
  std::string text;  // without the stop string; UTF-8: bytes that are no character come as U+FFFD
  FinishReason finish = FinishReason::Length;
  std::int64_t prompt_tokens = 0;
  double prompt_seconds = 0;
  double decode_seconds = 0;  // a pass counts for every request in it
};

/// Turns ids into text piece by piece.
using TokenToText = std::function<std::string(std::int32_t)>;

/// Called with each new piece of text of request `index`, whole UTF-8 characters only, and only
/// once no stop string can begin in it any more. Return false to cancel that request.
using OnText = std::function<bool(std::size_t index, const std::string& piece)>;

struct GenerateOptions {
  std::int64_t n_ctx = 0;  // positions per sequence, at most the model's; 0: what the longest needs
  int n_parallel = 8;
  std::int64_t n_batch = 512;
  const std::atomic<bool>* cancel = nullptr;
};

/// Runs requests, up to `n_parallel` at a time in one cache, a finished one making room for the
/// next (in order). Each prompt is prefilled alone, in pieces of at most `n_batch` tokens; then all
/// sequences at work decode in one pass per token. Results in request order. They depend on
/// n_parallel only as far as a matrix product's float32 summation order depends on the number of
/// rows. A sequence ends at a stop id, a stop string, max_tokens, or when prompt and continuation
/// fill n_ctx. `cancel`, if given, is looked at between passes (Ctrl-C): all unfinished requests
/// end as Cancelled with what they have. Throws InputError, naming the request, for an empty
/// prompt, one longer than n_ctx, an empty stop string, or options out of range.
std::vector<Completion> generate(Decoder& decoder, std::span<const Request> requests,
                                 const TokenToText& to_text, const GenerateOptions& options,
                                 const OnText& on_text = {});

/// Holds back what may still become a stop string or an unfinished UTF-8 character. Stop strings
/// are found across the borders of pieces. What comes out is UTF-8: bytes that cannot be part of a
/// character, and a character left unfinished at the end, become U+FFFD.
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
