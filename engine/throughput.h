#pragma once

#include <cstdint>
#include <vector>

#include "engine/decoder.h"
#include "engine/monitor.h"
#include "kernels/base/tally.h"

namespace moesaic::engine {

/// Tokens per second of one kind of work over repetitions, as llama-bench measures it: model
/// loaded, one warm-up run that does not count, tokenisation and sampling excluded, random token
/// ids.
struct Throughput {
  std::vector<double> tokens_per_second;  // one per repetition
  double mean = 0;
  double stddev = 0;           // sample standard deviation; 0 for one repetition
  double bytes_per_token = 0;  // by the kernels' own tally, over all repetitions
};

/// pp: one empty sequence is prefilled with n_tokens in passes of at most n_batch; logits of the
/// last token only.
Throughput measure_prefill(Decoder& decoder, Tally& tally, std::int64_t n_tokens,
                           std::int64_t n_batch, int repetitions, Monitor& monitor);

/// tg: n_tokens single-token passes from an empty sequence, logits of each.
Throughput measure_decode(Decoder& decoder, Tally& tally, std::int64_t n_tokens, int repetitions,
                          Monitor& monitor);

}  // namespace moesaic::engine
