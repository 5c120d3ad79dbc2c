#include "engine/throughput.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <span>

namespace moesaic::engine {
namespace {

/// The work, if the decoder can do it.
const Work& checked(const Work& work, const DecoderShape& shape) {
  const std::string name = work.name();
  const std::int64_t timed = work.n_prompt + work.n_gen;
  require<InputError>(work.n_prompt >= 0 && work.n_gen >= 0 && timed >= 1,
                      "{}: {} tokens given, expected >= 1", name, timed);
  require<InputError>(work.n_prompt == 0 || work.n_gen == 0,
                      "{}: prompt and generated tokens given, expected one of them", name);
  require<InputError>(work.depth >= 0, "{}: depth of {} given, expected >= 0", name, work.depth);
  require<InputError>(work.depth + timed <= shape.context_length,
                      "{}: {} positions given, expected 1 to {}, the model's context length", name,
                      work.depth + timed, shape.context_length);
  require<InputError>(work.n_batch >= 1, "{}: batch of {} given, expected >= 1", name,
                      work.n_batch);
  require<InputError>(work.n_sequences >= 1 && (work.n_prompt == 0 || work.n_sequences == 1),
                      "{}: {} sequences given, expected {}", name, work.n_sequences,
                      work.n_prompt > 0 ? "1 for a prompt" : ">= 1");
  return work;
}

}  // namespace

std::string Work::name() const {
  std::string text = n_prompt > 0 ? fmt::format("pp{}", n_prompt) : fmt::format("tg{}", n_gen);
  if (n_sequences > 1) text += fmt::format(" x{}", n_sequences);
  if (depth > 0) text += fmt::format(" @ d{}", depth);
  return text;
}

TimedWork::TimedWork(Decoder& decoder, const Work& work, const Monitor& monitor)
    : decoder_(decoder),
      work_(checked(work, decoder.shape())),
      length_(work.depth + work.n_prompt + work.n_gen),
      cache_(decoder.make_cache(work.n_sequences, length_)),
      ids_(static_cast<std::size_t>(work.n_sequences * length_)),
      logits_(static_cast<std::size_t>(work.n_sequences * decoder.shape().vocab_size)) {
  const auto n_rows = static_cast<std::size_t>(
      std::max(work.n_sequences, std::min(work.n_batch, std::max(work.depth, work.n_prompt))));
  tokens_.resize(n_rows);
  slots_.resize(n_rows);
  positions_.resize(n_rows);
  outputs_.resize(static_cast<std::size_t>(work.n_sequences));
  shuffle();
  fill_depth(monitor);
  // A few decoded tokens warm up, as in llama-bench; a whole run would double the time for nothing.
  if (work.n_prompt > 0) {
    prefill(monitor);
  } else {
    decode(std::min<std::int64_t>(work.n_gen, 4), monitor);
  }
}

double TimedWork::run(const Monitor& monitor) {
  shuffle();
  const auto start = std::chrono::steady_clock::now();
  if (work_.n_prompt > 0) {
    prefill(monitor);
  } else {
    decode(work_.n_gen, monitor);
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// What stands in the cache beyond the depth need not be cleared: a position is only ever read after
// the run has written it.
void TimedWork::shuffle() {
  const auto vocab_size = static_cast<std::uint64_t>(decoder_.shape().vocab_size);
  for (std::int32_t& id : ids_) id = static_cast<std::int32_t>(rng_() % vocab_size);
}

void TimedWork::fill_depth(const Monitor& monitor) {
  for (std::int64_t s = 0; s < work_.n_sequences; ++s) {
    for (std::int64_t begin = 0; begin < work_.depth; begin += work_.n_batch) {
      monitor.check();
      const std::int64_t n = std::min(work_.n_batch, work_.depth - begin);
      for (std::int64_t i = 0; i < n; ++i) {
        const auto row = static_cast<std::size_t>(i);
        tokens_[row] = ids_[static_cast<std::size_t>(s * length_ + begin + i)];
        slots_[row] = static_cast<std::int32_t>(s);
        positions_[row] = static_cast<std::int32_t>(begin + i);
      }
      forward(static_cast<std::size_t>(n), 0);
    }
  }
}

void TimedWork::prefill(const Monitor& monitor) {
  for (std::int64_t begin = work_.depth; begin < length_; begin += work_.n_batch) {
    monitor.check();
    const std::int64_t n = std::min(work_.n_batch, length_ - begin);
    for (std::int64_t i = 0; i < n; ++i) {
      const auto row = static_cast<std::size_t>(i);
      tokens_[row] = ids_[static_cast<std::size_t>(begin + i)];
      slots_[row] = 0;
      positions_[row] = static_cast<std::int32_t>(begin + i);
    }
    outputs_[0] = static_cast<std::int32_t>(n) - 1;
    forward(static_cast<std::size_t>(n), begin + n == length_ ? 1 : 0);
  }
}

void TimedWork::decode(std::int64_t n_steps, const Monitor& monitor) {
  for (std::int64_t position = work_.depth; position < work_.depth + n_steps; ++position) {
    monitor.check();
    for (std::int64_t s = 0; s < work_.n_sequences; ++s) {
      const auto row = static_cast<std::size_t>(s);
      tokens_[row] = ids_[static_cast<std::size_t>(s * length_ + position)];
      slots_[row] = static_cast<std::int32_t>(s);
      positions_[row] = static_cast<std::int32_t>(position);
      outputs_[row] = static_cast<std::int32_t>(s);
    }
    forward(outputs_.size(), outputs_.size());
  }
}

void TimedWork::forward(std::size_t n_rows, std::size_t n_outputs) {
  const Batch batch{std::span(tokens_).first(n_rows), std::span(slots_).first(n_rows),
                    std::span(positions_).first(n_rows), std::span(outputs_).first(n_outputs)};
  decoder_.forward(
      batch, *cache_,
      Matrix(logits_.data(), static_cast<std::int64_t>(n_outputs), decoder_.shape().vocab_size));
}

Throughput measure(Decoder& decoder, Tally& tally, const Work& work, int repetitions,
                   Monitor& monitor, const std::function<void()>& between) {
  require<InputError>(repetitions >= 1, "{}: {} repetitions given, expected >= 1", work.name(),
                      repetitions);
  monitor.stage(work.name(), repetitions);
  TimedWork timed(decoder, work, monitor);

  Throughput result;
  const std::int64_t bytes_before = tally.total();
  if (between) between();
  for (int i = 0; i < repetitions; ++i) {
    result.tokens_per_second.push_back(static_cast<double>(work.n_tokens()) / timed.run(monitor));
    monitor.advance(i + 1, fmt::format("{:.1f} tokens/s", result.tokens_per_second.back()));
    if (between) between();
  }
  result.bytes_per_token = static_cast<double>(tally.total() - bytes_before) /
                           static_cast<double>(work.n_tokens() * repetitions);
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

Throughput measure_prefill(Decoder& decoder, Tally& tally, std::int64_t n_tokens,
                           std::int64_t n_batch, int repetitions, Monitor& monitor) {
  Work work;
  work.n_prompt = n_tokens;
  work.n_batch = n_batch;
  return measure(decoder, tally, work, repetitions, monitor);
}

Throughput measure_decode(Decoder& decoder, Tally& tally, std::int64_t n_tokens, int repetitions,
                          Monitor& monitor) {
  Work work;
  work.n_gen = n_tokens;
  return measure(decoder, tally, work, repetitions, monitor);
}

}  // namespace moesaic::engine
