#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "engine/decoder.h"
#include "engine/kv_cache.h"
#include "engine/monitor.h"
#include "kernels/base/aligned_buffer.h"
#include "kernels/base/tally.h"

namespace moesaic::engine {

/// What is timed, as llama-bench and llama-batched-bench define it: either a prompt is prefilled
/// (n_prompt > 0, n_gen = 0) or tokens are decoded (n_gen > 0, n_prompt = 0).
struct Work {
  std::int64_t n_prompt = 0;     // tokens of one sequence; logits of the last one only
  std::int64_t n_gen = 0;        // tokens of each sequence; a pass is one token of every sequence,
                                 // logits of all
  std::int64_t n_sequences = 1;  // decoded together; 1 for prefill
  std::int64_t depth = 0;        // tokens of each sequence in the cache before the clock starts
  std::int64_t n_batch = 512;    // tokens per prefill pass, the untimed depth's too

  /// All tokens that pass the model while the clock runs.
  std::int64_t n_tokens() const { return n_prompt + n_gen * n_sequences; }
  /// "pp512", "tg128", "tg128 x16", "tg128 @ d512".
  std::string name() const;
};

/// Work made ready to be timed again and again: random token ids, cache of the size needed, depth
/// filled in, kernels and cache warmed up. Tokenisation and sampling are no part of it.
class TimedWork {
 public:
  /// Throws InputError for sizes that make no sense or exceed the model's context; Interrupted.
  TimedWork(Decoder& decoder, const Work& work, const Monitor& monitor);

  /// Does the work once, from the depth on with new random ids; seconds that it took.
  double run(const Monitor& monitor);

 private:
  void shuffle();
  void fill_depth(const Monitor& monitor);
  void prefill(const Monitor& monitor);
  void decode(std::int64_t n_steps, const Monitor& monitor);
  void forward(std::size_t n_rows, std::size_t n_outputs);

  Decoder& decoder_;
  Work work_;
  std::int64_t length_;  // positions of a sequence: depth and what is timed
  std::unique_ptr<KvCache> cache_;
  std::mt19937_64 rng_{0};
  std::vector<std::int32_t> ids_;                                   // [n_sequences, length]
  std::vector<std::int32_t> tokens_, slots_, positions_, outputs_;  // of one pass
  AlignedBuffer<float> logits_;                                     // [n_sequences, vocab_size]
};

/// Tokens per second of one kind of work over repetitions; the warm-up does not count.
struct Throughput {
  std::vector<double> tokens_per_second;  // one per repetition, all sequences together
  double mean = 0;
  double stddev = 0;           // sample standard deviation; 0 for one repetition
  double bytes_per_token = 0;  // by the kernels' own tally, over all repetitions
};

/// `between` is called before, between and after the repetitions, off the clock. Throws InputError
/// for sizes that make no sense or exceed the model's context; Interrupted.
Throughput measure(Decoder& decoder, Tally& tally, const Work& work, int repetitions,
                   Monitor& monitor, const std::function<void()>& between = {});

/// pp: one empty sequence is prefilled with n_tokens in passes of at most n_batch; logits of the
/// last token only.
Throughput measure_prefill(Decoder& decoder, Tally& tally, std::int64_t n_tokens,
                           std::int64_t n_batch, int repetitions, Monitor& monitor);

/// tg: n_tokens single-token passes from an empty sequence, logits of each.
Throughput measure_decode(Decoder& decoder, Tally& tally, std::int64_t n_tokens, int repetitions,
                          Monitor& monitor);

}  // namespace moesaic::engine
