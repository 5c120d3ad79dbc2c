#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "engine/monitor.h"
#include "models/divergence_statistics.h"
#include "models/transformer.h"

namespace moesaic::models {

/// How a token stream is cut and scored, llama-perplexity's convention: BOS in front of the whole
/// stream where the model wants it, non-overlapping chunks of n_ctx, each chunk's first token
/// replaced by BOS where wanted, logits of positions n_ctx/2 … n_ctx−2 scored against the token
/// that follows (n_ctx − n_ctx/2 − 1 a chunk).
struct ChunkOptions {
  std::int64_t n_ctx = 512;
  std::int64_t n_chunks = -1;  // -1: all
};

/// Perplexity exp(mean nll) of a model on a text.
struct Perplexity {
  double perplexity = 0;
  double perplexity_stderr = 0;  // perplexity · standard error of the mean nll
  std::int64_t n_chunks = 0;
  std::int64_t n_ctx = 0;
  std::int64_t n_tokens_scored = 0;
  double tokens_per_second = 0;  // all tokens of the chunks, scored or not
};

/// `tokens` without BOS. `on_device`: where given, the same checkpoint on another device, which
/// runs in the model's place. Throws InputError if there is not one whole chunk (says how many
/// tokens there are and how many are needed).
Perplexity evaluate_perplexity(Transformer& model, const Tokenizer& tokenizer,
                               std::span<const std::int32_t> tokens, const ChunkOptions& options,
                               engine::Monitor& monitor, engine::Decoder* on_device = nullptr);

/// Both models over the same chunks, and how far the second strays from the first.
struct Divergence {
  Perplexity dense;
  Perplexity hybrid;
  DivergenceStatistics statistics;  // over scored positions; base is the dense model
  // Multiply-adds of the hybrid's MLPs over those of dense ones, of all tokens of the chunks;
  // nothing where it ran on a device, which does not count them.
  std::optional<double> active_fraction;
};

/// Resets the hybrid's tally, which counts its multiply-adds. `…_on_device` as above. Throws
/// InputError as above, and if the vocabularies differ.
Divergence evaluate_divergence(Transformer& dense, Transformer& hybrid, const Tokenizer& tokenizer,
                               std::span<const std::int32_t> tokens, const ChunkOptions& options,
                               engine::Monitor& monitor, engine::Decoder* dense_on_device = nullptr,
                               engine::Decoder* hybrid_on_device = nullptr);

/// Log-probabilities of given ids in one sequence, no BOS added; `on_device` as above.
struct TokenScores {
  std::vector<double>
      nll;  // −ln p(ids[i+1] | ids[0..i]), natural log, one per token after the first
  struct Top {
    std::int64_t pos;               // the distribution after ids[0..pos]
    std::vector<std::int32_t> ids;  // most likely first
    std::vector<double> logprob;
  };
  std::vector<Top> top;  // every position, if top_n > 0
};
TokenScores score_tokens(Transformer& model, std::span<const std::int32_t> ids, int top_n,
                         engine::Monitor& monitor, engine::Decoder* on_device = nullptr);

}  // namespace moesaic::models
