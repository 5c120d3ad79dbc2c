#include "engine/generation.h"

#include <algorithm>
#include <chrono>
#include <optional>

#include "engine/kv_cache.h"
#include "kernels/base/aligned_buffer.h"
#include "kernels/base/error.h"

namespace moesaic::engine {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// A request at work in a slot of the cache.
struct Sequence {
  std::size_t index;                  // of the request
  std::vector<std::int32_t> history;  // prompt and what was drawn
  std::int64_t limit;                 // length of history at which it ends
  Sampler sampler;
  StopFilter filter;
};

// Checks the requests and returns the positions that one sequence may take.
std::int64_t check_requests(std::span<const Request> requests, const GenerateOptions& options,
                            std::int64_t context_length) {
  require<InputError>(options.n_ctx >= 0 && options.n_ctx <= context_length,
                      "n_ctx: {} given, expected 0 to {}, the model's context length",
                      options.n_ctx, context_length);
  require<InputError>(options.n_parallel >= 1, "n_parallel: {} given, expected >= 1",
                      options.n_parallel);
  require<InputError>(options.n_batch >= 1, "n_batch: {} given, expected >= 1", options.n_batch);
  const std::int64_t most = options.n_ctx > 0 ? options.n_ctx : context_length;
  std::int64_t longest = 1;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    const Request& request = requests[i];
    const auto n_prompt = static_cast<std::int64_t>(request.prompt.size());
    require<InputError>(n_prompt > 0, "request {}: the prompt is empty", i);
    require<InputError>(n_prompt <= most,
                        "request {}: the prompt has {} tokens, expected at most {} (n_ctx)", i,
                        n_prompt, most);
    require<InputError>(request.max_tokens >= -1,
                        "request {}: max_tokens: {} given, expected >= -1 (-1: no limit)", i,
                        request.max_tokens);
    for (const std::string& stop : request.stop) {
      require<InputError>(!stop.empty(), "request {}: a stop string is empty", i);
    }
    try {
      validate(request.sampling);
    } catch (const InputError& e) {
      throw InputError(fmt::format("request {}: {}", i, e.what()));
    }
    const std::int64_t wanted = request.max_tokens < 0 ? most : n_prompt + request.max_tokens;
    longest = std::max(longest, std::min(wanted, most));
  }
  return longest;
}

// One call of generate(): the cache, its slots and buffers that every pass uses again.
class Generation {
 public:
  Generation(Decoder& decoder, std::span<const Request> requests, const TokenToText& to_text,
             const GenerateOptions& options, const OnText& on_text)
      : decoder_(decoder),
        requests_(requests),
        to_text_(to_text),
        options_(options),
        on_text_(on_text),
        shape_(decoder.shape()),
        n_ctx_(check_requests(requests, options, shape_.context_length)),
        slots_(std::clamp<std::size_t>(requests.size(), 1,
                                       static_cast<std::size_t>(options.n_parallel))),
        cache_(decoder.make_cache(static_cast<std::int64_t>(slots_.size()), n_ctx_)),
        logits_(slots_.size() * static_cast<std::size_t>(shape_.vocab_size)),
        completions_(requests.size()) {
    const std::size_t rows =
        std::max(slots_.size(), static_cast<std::size_t>(std::min(options.n_batch, n_ctx_)));
    batch_tokens_.reserve(rows);
    batch_slots_.reserve(rows);
    batch_positions_.reserve(rows);
    batch_outputs_.reserve(rows);
    draws_.reserve(slots_.size());
    ids_.reserve(slots_.size());
    for (std::size_t i = 0; i < requests.size(); ++i) {
      completions_[i].finish = FinishReason::Cancelled;  // until something else ends it
      completions_[i].prompt_tokens = static_cast<std::int64_t>(requests[i].prompt.size());
    }
  }

  std::vector<Completion> run() {
    while (!cancelled()) {
      for (std::size_t s = 0; s < slots_.size() && !cancelled(); ++s) {
        while (!slots_[s] && next_ < requests_.size() && !cancelled()) start(s);
      }
      if (!decode()) break;
    }
    for (std::optional<Sequence>& slot : slots_) {
      if (slot) finish(slot, FinishReason::Cancelled);
    }
    return std::move(completions_);
  }

 private:
  bool cancelled() const {
    return options_.cancel != nullptr && options_.cancel->load(std::memory_order_relaxed);
  }

  void clear_batch() {
    batch_tokens_.clear();
    batch_slots_.clear();
    batch_positions_.clear();
    batch_outputs_.clear();
  }
  void push_row(std::int32_t token, std::size_t slot, std::int64_t position) {
    batch_tokens_.push_back(token);
    batch_slots_.push_back(static_cast<std::int32_t>(slot));
    batch_positions_.push_back(static_cast<std::int32_t>(position));
  }
  Batch batch() const { return {batch_tokens_, batch_slots_, batch_positions_, batch_outputs_}; }
  void forward() {
    decoder_.forward(batch(), *cache_,
                     Matrix(logits_.data(), static_cast<std::int64_t>(batch_outputs_.size()),
                            shape_.vocab_size));
  }
  std::span<const float> logits(std::size_t row) const {
    const auto n = static_cast<std::size_t>(shape_.vocab_size);
    return logits_.span().subspan(row * n, n);
  }
  Sequence& sequence_of(std::int32_t output) {
    const auto row = static_cast<std::size_t>(output);
    return *slots_[static_cast<std::size_t>(batch_slots_[row])];
  }

  // Runs the batch and leaves the next token of each of its outputs in ids_: drawn by the decoder,
  // if it can and every sequence lets it, or from the logits.
  void forward_and_draw() {
    ids_.resize(batch_outputs_.size());
    const bool by_decoder =
        decoder_.draws() && std::ranges::none_of(batch_outputs_, [&](std::int32_t output) {
          return sequence_of(output).sampler.needs_history();
        });
    if (by_decoder) {
      draws_.clear();
      for (const std::int32_t o : batch_outputs_) draws_.push_back(sequence_of(o).sampler.draw());
      decoder_.forward_and_draw(batch(), *cache_, draws_, ids_);
      require<Error>(std::ranges::find(ids_, -1) == ids_.end(), "sampler: every logit is NaN");
      return;
    }
    forward();
    for (std::size_t i = 0; i < ids_.size(); ++i) {
      Sequence& sequence = sequence_of(batch_outputs_[i]);
      ids_[i] = sequence.sampler.sample(logits(i), sequence.history);
    }
  }

  // Prefills the next request into a free slot, alone, and draws its first token. Alone, so that
  // what a prompt leaves in the cache does not depend on its neighbours.
  void start(std::size_t s) {
    const std::size_t index = next_++;
    const Request& request = requests_[index];
    const auto n_prompt = static_cast<std::int64_t>(request.prompt.size());
    std::int64_t limit = n_ctx_;
    if (request.max_tokens >= 0) limit = std::min(limit, n_prompt + request.max_tokens);
    if (limit <= n_prompt) {
      completions_[index].finish = FinishReason::Length;
      return;
    }
    Sequence& sequence = slots_[s].emplace(Sequence{
        index, request.prompt, limit, Sampler(request.sampling), StopFilter(request.stop)});
    sequence.history.reserve(static_cast<std::size_t>(limit));
    completions_[index].tokens.reserve(static_cast<std::size_t>(limit - n_prompt));
    const Clock::time_point begin = Clock::now();
    for (std::int64_t first = 0; first < n_prompt; first += options_.n_batch) {
      if (cancelled()) return;
      const std::int64_t end = std::min(first + options_.n_batch, n_prompt);
      clear_batch();
      for (std::int64_t p = first; p < end; ++p) {
        push_row(request.prompt[static_cast<std::size_t>(p)], s, p);
      }
      if (end < n_prompt) {
        forward();
      } else {
        batch_outputs_.push_back(static_cast<std::int32_t>(end - first) - 1);
        forward_and_draw();
      }
    }
    completions_[index].prompt_seconds = seconds_since(begin);
    take(slots_[s], ids_[0]);
  }

  // One token for every sequence at work; false if there is none.
  bool decode() {
    clear_batch();
    for (std::size_t s = 0; s < slots_.size(); ++s) {
      if (!slots_[s]) continue;
      const std::vector<std::int32_t>& history = slots_[s]->history;
      batch_outputs_.push_back(static_cast<std::int32_t>(batch_tokens_.size()));
      push_row(history.back(), s, static_cast<std::int64_t>(history.size()) - 1);
    }
    if (batch_tokens_.empty()) return next_ < requests_.size();
    const Clock::time_point begin = Clock::now();
    forward_and_draw();
    const double seconds = seconds_since(begin);
    for (std::size_t row = 0; row < batch_slots_.size(); ++row) {
      std::optional<Sequence>& slot = slots_[static_cast<std::size_t>(batch_slots_[row])];
      completions_[slot->index].decode_seconds += seconds;
      take(slot, ids_[row]);
    }
    return true;
  }

  // Appends the next token of a sequence and ends it where that ends it.
  void take(std::optional<Sequence>& slot, std::int32_t id) {
    Sequence& sequence = *slot;
    const Request& request = requests_[sequence.index];
    Completion& completion = completions_[sequence.index];
    if (std::find(request.stop_ids.begin(), request.stop_ids.end(), id) != request.stop_ids.end()) {
      finish(slot, FinishReason::Stop);
      return;
    }
    sequence.history.push_back(id);
    completion.tokens.push_back(id);
    if (!show(sequence, sequence.filter.push(to_text_(id)))) {
      completion.finish = FinishReason::Cancelled;
      slot.reset();
    } else if (sequence.filter.stopped()) {
      finish(slot, FinishReason::Stop);
    } else if (static_cast<std::int64_t>(sequence.history.size()) >= sequence.limit) {
      finish(slot, FinishReason::Length);
    }
  }

  // Appends to the text and hands it out; false if the reader wants no more.
  bool show(Sequence& sequence, const std::string& text) {
    if (text.empty()) return true;
    completions_[sequence.index].text += text;
    return !on_text_ || on_text_(sequence.index, text);
  }

  // Ends a sequence, releases what its filter held back, and frees the slot.
  void finish(std::optional<Sequence>& slot, FinishReason reason) {
    const bool wanted = show(*slot, slot->filter.flush());
    completions_[slot->index].finish = wanted ? reason : FinishReason::Cancelled;
    slot.reset();
  }

  Decoder& decoder_;
  std::span<const Request> requests_;
  const TokenToText& to_text_;
  const GenerateOptions& options_;
  const OnText& on_text_;
  DecoderShape shape_;
  std::int64_t n_ctx_;
  std::vector<std::optional<Sequence>> slots_;
  std::unique_ptr<KvCache> cache_;
  AlignedBuffer<float> logits_;  // [n_slots, vocab_size]
  std::vector<Completion> completions_;
  std::size_t next_ = 0;  // first request that has not begun
  std::vector<std::int32_t> batch_tokens_, batch_slots_, batch_positions_, batch_outputs_;
  std::vector<kernels::Draw> draws_;  // of a pass that draws
  std::vector<std::int32_t> ids_;     // that a pass has drawn, one for each output
};

}  // namespace

std::vector<Completion> generate(Decoder& decoder, std::span<const Request> requests,
                                 const TokenToText& to_text, const GenerateOptions& options,
                                 const OnText& on_text) {
  return Generation(decoder, requests, to_text, options, on_text).run();
}

}  // namespace moesaic::engine
