#include "engine/throughput.h"

#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <random>

#include "engine/kv_cache.h"
#include "kernels/base/aligned_buffer.h"

namespace moesaic::engine {
namespace {

// One sequence of random ids, run in passes of at most n_batch with logits of some rows.
class Run {
 public:
  Run(Decoder& decoder, std::int64_t n_tokens, std::int64_t n_batch)
      : decoder_(decoder),
        shape_(decoder.shape()),
        n_batch_(std::min(n_batch, n_tokens)),
        cache_(shape_.n_layers, 1, n_tokens, shape_.n_kv_heads, shape_.head_dim),
        tokens_(static_cast<std::size_t>(n_tokens)),
        slots_(static_cast<std::size_t>(n_tokens), 0),
        positions_(static_cast<std::size_t>(n_tokens)),
        logits_(static_cast<std::size_t>(shape_.vocab_size)) {
    for (std::size_t i = 0; i < positions_.size(); ++i) {
      positions_[i] = static_cast<std::int32_t>(i);
    }
  }

  // Draws new ids. Every step starts from an empty sequence: a position is only ever read after the
  // run has written it.
  void shuffle() {
    for (std::int32_t& id : tokens_) {
      id = static_cast<std::int32_t>(rng_() % static_cast<std::uint64_t>(shape_.vocab_size));
    }
  }

  // Runs the first n_tokens; logits of the last row of every pass, or of the last pass alone.
  void pass(std::int64_t n_tokens, bool all_logits, const Monitor& monitor) {
    for (std::int64_t begin = 0; begin < n_tokens; begin += n_batch_) {
      monitor.check();
      const auto n = static_cast<std::size_t>(std::min(n_batch_, n_tokens - begin));
      const auto first = static_cast<std::size_t>(begin);
      const bool wanted = all_logits || begin + n_batch_ >= n_tokens;
      const std::int32_t output = static_cast<std::int32_t>(n) - 1;
      const Batch batch{std::span(tokens_).subspan(first, n), std::span(slots_).subspan(first, n),
                        std::span(positions_).subspan(first, n),
                        std::span(&output, wanted ? std::size_t{1} : std::size_t{0})};
      decoder_.forward(batch, cache_, Matrix(logits_.data(), wanted ? 1 : 0, shape_.vocab_size));
    }
  }

 private:
  Decoder& decoder_;
  DecoderShape shape_;
  std::int64_t n_batch_;
  KvCache cache_;
  std::mt19937_64 rng_{0};
  std::vector<std::int32_t> tokens_, slots_, positions_;  // [n_tokens]
  AlignedBuffer<float> logits_;                           // [vocab_size]
};

Throughput measure(Decoder& decoder, Tally& tally, std::string_view name, std::int64_t n_tokens,
                   std::int64_t n_batch, std::int64_t n_warmup, bool all_logits, int repetitions,
                   Monitor& monitor) {
  require<InputError>(n_tokens >= 1 && n_tokens <= decoder.shape().context_length,
                      "{}: {} tokens given, expected 1 to {}, the model's context length", name,
                      n_tokens, decoder.shape().context_length);
  require<InputError>(n_batch >= 1, "{}: batch of {} given, expected >= 1", name, n_batch);
  require<InputError>(repetitions >= 1, "{}: {} repetitions given, expected >= 1", name,
                      repetitions);
  monitor.stage(fmt::format("{}{}", name, n_tokens), repetitions);
  Run run(decoder, n_tokens, n_batch);
  run.shuffle();
  run.pass(n_warmup, all_logits, monitor);

  Throughput result;
  const std::int64_t bytes_before = tally.total();
  for (int i = 0; i < repetitions; ++i) {
    run.shuffle();
    const auto start = std::chrono::steady_clock::now();
    run.pass(n_tokens, all_logits, monitor);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    result.tokens_per_second.push_back(static_cast<double>(n_tokens) / seconds.count());
    monitor.advance(i + 1, fmt::format("{:.1f} tokens/s", result.tokens_per_second.back()));
  }
  result.bytes_per_token = static_cast<double>(tally.total() - bytes_before) /
                           static_cast<double>(n_tokens * repetitions);
  for (const double tps : result.tokens_per_second) result.mean += tps / repetitions;
  if (repetitions > 1) {
    double squares = 0;
    for (const double tps : result.tokens_per_second) {
      squares += (tps - result.mean) * (tps - result.mean);
    }
    result.stddev = std::sqrt(squares / (repetitions - 1));
  }
  return result;
}

}  // namespace

Throughput measure_prefill(Decoder& decoder, Tally& tally, std::int64_t n_tokens,
                           std::int64_t n_batch, int repetitions, Monitor& monitor) {
  return measure(decoder, tally, "pp", n_tokens, n_batch, n_tokens, false, repetitions, monitor);
}

Throughput measure_decode(Decoder& decoder, Tally& tally, std::int64_t n_tokens, int repetitions,
                          Monitor& monitor) {
  // A few tokens warm up, as in llama-bench; a whole run would double the time for nothing.
  return measure(decoder, tally, "tg", n_tokens, 1, std::min<std::int64_t>(n_tokens, 4), true,
                 repetitions, monitor);
}

}  // namespace moesaic::engine
