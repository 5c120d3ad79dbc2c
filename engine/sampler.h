#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "engine/logits.h"
#include "kernels/draw.h"

namespace moesaic::engine {

/// How the next token is drawn. Order, as in llama.cpp: repetition penalty, top-k, top-p, min-p,
/// temperature, draw.
struct SamplingOptions {
  float temperature = 0.8F;  // 0: greedy
  int top_k = 40;            // 0: off
  float top_p = 0.95F;       // 1: off
  float min_p = 0.05F;       // 0: off
  float repeat_penalty =
      1.0F;  // 1: off; positive logits divided by it, negative ones multiplied (CTRL, Keskar 2019)
  int repeat_last_n = 64;  // tokens the penalty looks back on; 0: off, -1: all
  std::uint64_t seed = 0;
};

/// Throws InputError that names the option, the value found and the range expected.
void validate(const SamplingOptions& options);

/// Draws tokens for one sequence. The same options and logits give the same tokens on every machine
/// with the same C++ library (mt19937_64, own uniform).
class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options);

  /// Next token given logits [vocab_size] and the tokens so far (prompt included). NaN logits are
  /// never drawn; if every logit is NaN, throws Error.
  std::int32_t sample(std::span<const float> logits, std::span<const std::int32_t> history);

  /// True if the tokens so far change what sample() draws.
  bool needs_history() const {
    return options_.repeat_penalty != 1.0F && options_.repeat_last_n != 0;
  }
  /// What sample() would do, for a decoder that draws where the logits are; takes the random number
  /// that sample() would take. Not where needs_history().
  kernels::Draw draw();

 private:
  double random();
  std::span<const float> penalise(std::span<const float> logits,
                                  std::span<const std::int32_t> history);

  SamplingOptions options_;
  std::mt19937_64 rng_;
  struct Candidate {
    float logit;
    std::int32_t id;
  };
  std::vector<Candidate> candidates_;  // kept between calls: no allocation once warm
  std::vector<float> penalised_;       // the logits after the repetition penalty
};

}  // namespace moesaic::engine
