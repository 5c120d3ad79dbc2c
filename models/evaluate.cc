#include "models/evaluate.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <optional>

#include "engine/kv_cache.h"
#include "engine/logits.h"
#include "kernels/base/aligned_buffer.h"
#include "kernels/base/error.h"

namespace moesaic::models {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kPass = 512;                              // tokens per forward pass
constexpr std::int64_t kLogitsElements = std::int64_t{1} << 25;  // 128 MiB per model

// Runs one sequence at a time through a model and computes logits for blocks of the positions
// first_scored … first_scored + n_scored − 1, so that memory stays bounded whatever the vocabulary.
// On a device, where the rows between layers and head stay, a block's rows run when its logits are
// asked for.
class SequenceRunner {
 public:
  SequenceRunner(Transformer& model, std::int64_t n_ctx, std::int64_t first_scored,
                 std::int64_t n_scored, engine::Decoder* on_device = nullptr)
      : model_(model),
        on_device_(on_device),
        cache_(decoder().make_cache(1, n_ctx)),
        first_scored_(first_scored),
        n_scored_(n_scored),
        block_rows_(std::clamp<std::int64_t>(kLogitsElements / model.shape().vocab_size, 1,
                                             std::max<std::int64_t>(n_scored, 1))),
        slots_(static_cast<std::size_t>(n_ctx), 0),
        positions_(static_cast<std::size_t>(n_ctx)),
        pass_(on_device
                  ? 0
                  : static_cast<std::size_t>(std::min(kPass, n_ctx) * model.config().d_model)),
        residual_(on_device ? 0 : static_cast<std::size_t>(n_scored * model.config().d_model)),
        logits_(static_cast<std::size_t>(block_rows_ * model.shape().vocab_size)) {
    std::iota(positions_.begin(), positions_.end(), 0);
  }

  std::int64_t block_rows() const { return block_rows_; }
  double seconds() const { return seconds_; }  // spent in the model so far

  void run(std::span<const std::int32_t> ids, const engine::Monitor& monitor) {
    const std::int64_t d_model = model_.config().d_model;
    const auto n_ids = static_cast<std::int64_t>(ids.size());
    if (on_device_ != nullptr) {
      ids_.assign(ids.begin(), ids.end());
      for (std::int64_t begin = 0; begin < first_scored_; begin += kPass) {
        monitor.check();
        forward(begin, std::min(kPass, first_scored_ - begin), {});
      }
      return;
    }
    for (std::int64_t begin = 0; begin < n_ids; begin += kPass) {
      monitor.check();
      const Clock::time_point start = Clock::now();
      const std::int64_t n = std::min(kPass, n_ids - begin);
      const auto part = [&](const auto& all) {
        return std::span<const std::int32_t>(all).subspan(static_cast<std::size_t>(begin),
                                                          static_cast<std::size_t>(n));
      };
      // Rows are counted like positions, from 0 at the pass's first token.
      const std::int64_t low = std::clamp<std::int64_t>(first_scored_ - begin, 0, n);
      const std::int64_t high = std::clamp<std::int64_t>(first_scored_ + n_scored_ - begin, low, n);
      const auto outputs =
          std::span<const std::int32_t>(positions_)
              .subspan(static_cast<std::size_t>(low), static_cast<std::size_t>(high - low));
      model_.run_layers({part(ids), part(slots_), part(positions_), outputs}, *cache_,
                        Matrix(pass_.data(), n, d_model));
      std::copy_n(
          pass_.data(), (high - low) * d_model,
          residual_.data() + std::max<std::int64_t>(begin + low - first_scored_, 0) * d_model);
      seconds_ += std::chrono::duration<double>(Clock::now() - start).count();
    }
  }

  // Logits [n, vocab_size] after scored positions number first … first + n − 1; n <= block_rows().
  // Blocks come in order, each once.
  ConstMatrix logits(std::int64_t first, std::int64_t n) {
    const Matrix logits(logits_.data(), n, model_.shape().vocab_size);
    if (on_device_ != nullptr) {
      forward(first_scored_ + first, n, logits);
      return logits;
    }
    const Clock::time_point start = Clock::now();
    const std::int64_t d_model = model_.config().d_model;
    model_.head(ConstMatrix(residual_.data() + first * d_model, n, d_model), logits);
    seconds_ += std::chrono::duration<double>(Clock::now() - start).count();
    return logits;
  }

 private:
  engine::Decoder& decoder() { return on_device_ != nullptr ? *on_device_ : model_; }

  // Tokens [begin, begin + n) of the sequence on the device; logits of all of them, or of none.
  void forward(std::int64_t begin, std::int64_t n, Matrix logits) {
    const Clock::time_point start = Clock::now();
    const auto part = [&](const auto& all, std::int64_t first, std::int64_t count) {
      return std::span<const std::int32_t>(all).subspan(static_cast<std::size_t>(first),
                                                        static_cast<std::size_t>(count));
    };
    // Rows are counted like positions, from 0.
    on_device_->forward({part(ids_, begin, n), part(slots_, begin, n), part(positions_, begin, n),
                         part(positions_, 0, logits.rows)},
                        *cache_, logits);
    seconds_ += std::chrono::duration<double>(Clock::now() - start).count();
  }

  Transformer& model_;
  engine::Decoder* on_device_;
  std::unique_ptr<engine::KvCache> cache_;
  std::int64_t first_scored_, n_scored_, block_rows_;
  std::vector<std::int32_t> slots_, positions_;
  std::vector<std::int32_t> ids_;  // of the sequence, on a device
  AlignedBuffer<float> pass_;      // [min(kPass, n_ctx), d_model]
  AlignedBuffer<float> residual_;  // [n_scored, d_model]
  AlignedBuffer<float> logits_;    // [block_rows, vocab_size]
  double seconds_ = 0;
};

std::span<const float> row(ConstMatrix m, std::int64_t r) {
  return {m.row(r), static_cast<std::size_t>(m.cols)};
}

// fn(r) for r in [0, n), on all threads.
template <class Fn>
void for_rows(ThreadPool& pool, std::int64_t n, Fn&& fn) {
  pool.run([&](int thread) {
    const Range range = split(n, pool.n_threads(), thread);
    for (std::int64_t r = range.begin; r < range.end; ++r) fn(r);
  });
}

// Mean and standard error of the mean, as llama-perplexity computes them.
struct Mean {
  double sum = 0;
  double squares = 0;
  std::int64_t n = 0;

  void add(double value) {
    sum += value;
    squares += value * value;
    ++n;
  }
  double mean() const { return n == 0 ? 0 : sum / static_cast<double>(n); }
  double stderror() const {
    if (n < 2) return 0;
    const double variance = squares / static_cast<double>(n) - mean() * mean();
    return std::sqrt(std::max(variance, 0.0) / static_cast<double>(n - 1));
  }
};

Perplexity summary(const Mean& nll, const ChunkOptions& options, std::int64_t n_chunks,
                   double seconds) {
  const double perplexity = std::exp(nll.mean());
  return {.perplexity = perplexity,
          .perplexity_stderr = perplexity * nll.stderror(),
          .n_chunks = n_chunks,
          .n_ctx = options.n_ctx,
          .n_tokens_scored = nll.n,
          .tokens_per_second =
              seconds > 0 ? static_cast<double>(n_chunks * options.n_ctx) / seconds : 0};
}

// The token stream, BOS in front where the model wants it, cut into chunks.
class Chunks {
 public:
  Chunks(std::span<const std::int32_t> tokens, const Tokenizer& tokenizer,
         const ChunkOptions& options, std::int64_t context_length)
      : tokens_(tokens), n_ctx_(options.n_ctx) {
    require<InputError>(n_ctx_ >= 4 && n_ctx_ <= context_length,
                        "n_ctx: {} given, expected 4 to {}, the model's context length", n_ctx_,
                        context_length);
    require<InputError>(options.n_chunks == -1 || options.n_chunks >= 1,
                        "chunks: {} given, expected >= 1 (-1: all)", options.n_chunks);
    if (tokenizer.add_bos) {
      require<InputError>(tokenizer.bos.has_value(),
                          "the model wants BOS in front, but its tokenizer has none");
      bos_ = tokenizer.bos;
    }
    const std::int64_t n_bos = bos_ ? 1 : 0;
    n_ = (static_cast<std::int64_t>(tokens.size()) + n_bos) / n_ctx_;
    require<InputError>(n_ >= 1, "the text has {} tokens, expected at least {}, one chunk",
                        tokens.size(), n_ctx_ - n_bos);
    if (options.n_chunks > 0) n_ = std::min(n_, options.n_chunks);
    input_.resize(static_cast<std::size_t>(n_ctx_));
  }

  std::int64_t size() const { return n_; }
  std::int64_t first_scored() const { return n_ctx_ / 2; }
  std::int64_t n_scored() const { return n_ctx_ - n_ctx_ / 2 - 1; }

  // What the model is given for chunk c, valid until the next call.
  std::span<const std::int32_t> input(std::int64_t c) {
    input_[0] = bos_ ? *bos_ : at(c * n_ctx_);
    for (std::int64_t p = 1; p < n_ctx_; ++p) {
      input_[static_cast<std::size_t>(p)] = at(c * n_ctx_ + p);
    }
    return input_;
  }
  // The token that follows position p of chunk c.
  std::int32_t target(std::int64_t c, std::int64_t p) const { return at(c * n_ctx_ + p + 1); }

 private:
  // Element i of the stream; i > 0 where BOS stands in front.
  std::int32_t at(std::int64_t i) const {
    return tokens_[static_cast<std::size_t>(i - (bos_ ? 1 : 0))];
  }

  std::span<const std::int32_t> tokens_;
  std::int64_t n_ctx_;
  std::int64_t n_ = 0;
  std::optional<std::int32_t> bos_;
  std::vector<std::int32_t> input_;
};

// Targets are looked up in the logits; the inputs are checked by the embedding.
void check_ids(std::span<const std::int32_t> ids, std::int64_t vocab_size) {
  for (std::size_t i = 0; i < ids.size(); ++i) {
    require<InputError>(ids[i] >= 0 && ids[i] < vocab_size, "token {} has id {}, expected 0 to {}",
                        i, ids[i], vocab_size - 1);
  }
}

// The n largest logits of a row, largest first, the lower id on ties.
void top_logits(std::span<const float> logits, double lse, std::size_t n, TokenScores::Top& top) {
  const auto before = [&](std::int32_t a, std::int32_t b) {
    const float x = logits[static_cast<std::size_t>(a)];
    const float y = logits[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  };
  top.ids.resize(logits.size());
  std::iota(top.ids.begin(), top.ids.end(), 0);
  std::partial_sort(top.ids.begin(), top.ids.begin() + static_cast<std::ptrdiff_t>(n),
                    top.ids.end(), before);
  top.ids.resize(n);
  top.ids.shrink_to_fit();
  for (const std::int32_t id : top.ids) {
    top.logprob.push_back(logits[static_cast<std::size_t>(id)] - lse);
  }
}

// While it lives all rows go through the model's last layer, not only those that are scored, so
// that every layer weighs alike in the active fraction.
class AllRows {
 public:
  explicit AllRows(Transformer& model) : model_(model) {
    model.set_selection_observer([](int, std::int64_t, std::span<const std::int32_t>) {});
  }
  ~AllRows() { model_.set_selection_observer({}); }
  AllRows(const AllRows&) = delete;
  AllRows& operator=(const AllRows&) = delete;

 private:
  Transformer& model_;
};

// ln Σ exp of a row of the model's logits. Throws FormatError where it is NaN or infinite.
double checked_log_sum_exp(const Transformer& model, std::span<const float> logits) {
  const double lse = engine::log_sum_exp(logits);
  require<FormatError>(std::isfinite(lse),
                       "{}: gives NaN or infinite logits, expected finite ones: is it damaged?",
                       model.checkpoint().file->path().string());
  return lse;
}

}  // namespace

Perplexity evaluate_perplexity(Transformer& model, const Tokenizer& tokenizer,
                               std::span<const std::int32_t> tokens, const ChunkOptions& options,
                               engine::Monitor& monitor, engine::Decoder* on_device) {
  Chunks chunks(tokens, tokenizer, options, model.config().context_length);
  check_ids(tokens, model.config().vocab_size);
  SequenceRunner runner(model, options.n_ctx, chunks.first_scored(), chunks.n_scored(), on_device);
  std::vector<double> nll(static_cast<std::size_t>(runner.block_rows()));
  Mean mean;
  monitor.stage("perplexity", chunks.size());
  const Clock::time_point start = Clock::now();
  for (std::int64_t c = 0; c < chunks.size(); ++c) {
    runner.run(chunks.input(c), monitor);
    for (std::int64_t done = 0; done < chunks.n_scored(); done += runner.block_rows()) {
      monitor.check();
      const std::int64_t n = std::min(runner.block_rows(), chunks.n_scored() - done);
      const std::int64_t first = chunks.first_scored() + done;
      const ConstMatrix logits = runner.logits(done, n);
      for_rows(model.context().pool, n, [&](std::int64_t r) {
        nll[static_cast<std::size_t>(r)] =
            checked_log_sum_exp(model, row(logits, r)) - logits.row(r)[chunks.target(c, first + r)];
      });
      for (std::int64_t r = 0; r < n; ++r) mean.add(nll[static_cast<std::size_t>(r)]);
    }
    monitor.advance(c + 1, fmt::format("ppl {:.3f}", std::exp(mean.mean())));
  }
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  return summary(mean, options, chunks.size(), seconds);
}

Divergence evaluate_divergence(Transformer& dense, Transformer& hybrid, const Tokenizer& tokenizer,
                               std::span<const std::int32_t> tokens, const ChunkOptions& options,
                               engine::Monitor& monitor, engine::Decoder* dense_on_device,
                               engine::Decoder* hybrid_on_device) {
  require<InputError>(dense.config().vocab_size == hybrid.config().vocab_size,
                      "vocabularies differ: {} and {} entries, expected two models with one",
                      dense.config().vocab_size, hybrid.config().vocab_size);
  Chunks chunks(tokens, tokenizer, options,
                std::min(dense.config().context_length, hybrid.config().context_length));
  check_ids(tokens, dense.config().vocab_size);
  SequenceRunner dense_runner(dense, options.n_ctx, chunks.first_scored(), chunks.n_scored(),
                              dense_on_device);
  SequenceRunner hybrid_runner(hybrid, options.n_ctx, chunks.first_scored(), chunks.n_scored(),
                               hybrid_on_device);
  std::vector<TokenDivergence> positions(
      static_cast<std::size_t>(chunks.size() * chunks.n_scored()));
  Mean nll_dense, nll_hybrid, kl;
  double active = 0;
  const AllRows dense_rows(dense), hybrid_rows(hybrid);
  monitor.stage("compare", chunks.size());
  for (std::int64_t c = 0; c < chunks.size(); ++c) {
    const std::span<const std::int32_t> input = chunks.input(c);
    dense_runner.run(input, monitor);
    hybrid.context().tally.reset();  // the two models may share one
    hybrid_runner.run(input, monitor);
    active += hybrid.context().tally.active_fraction();
    const auto of_chunk =
        std::span(positions).subspan(static_cast<std::size_t>(c * chunks.n_scored()),
                                     static_cast<std::size_t>(chunks.n_scored()));
    for (std::int64_t done = 0; done < chunks.n_scored(); done += dense_runner.block_rows()) {
      monitor.check();
      const std::int64_t n = std::min(dense_runner.block_rows(), chunks.n_scored() - done);
      const std::int64_t first = chunks.first_scored() + done;
      const ConstMatrix p = dense_runner.logits(done, n);
      const ConstMatrix q = hybrid_runner.logits(done, n);
      for_rows(dense.context().pool, n, [&](std::int64_t r) {
        const std::int32_t target = chunks.target(c, first + r);
        const double lse_p = checked_log_sum_exp(dense, row(p, r));
        const double lse_q = checked_log_sum_exp(hybrid, row(q, r));
        of_chunk[static_cast<std::size_t>(done + r)] = {
            .nll_base = static_cast<float>(lse_p - p.row(r)[target]),
            .nll_q = static_cast<float>(lse_q - q.row(r)[target]),
            .kl = static_cast<float>(engine::kl_divergence(row(p, r), lse_p, row(q, r), lse_q)),
            .same_top = engine::argmax(row(p, r)) == engine::argmax(row(q, r))};
      });
    }
    for (const TokenDivergence& position : of_chunk) {
      nll_dense.add(position.nll_base);
      nll_hybrid.add(position.nll_q);
      kl.add(position.kl);
    }
    monitor.advance(c + 1, fmt::format("ppl {:.3f} / {:.3f}, KL {:.4f}", std::exp(nll_dense.mean()),
                                       std::exp(nll_hybrid.mean()), kl.mean()));
  }
  std::optional<double> fraction;
  if (hybrid_on_device == nullptr) fraction = active / static_cast<double>(chunks.size());
  return {.dense = summary(nll_dense, options, chunks.size(), dense_runner.seconds()),
          .hybrid = summary(nll_hybrid, options, chunks.size(), hybrid_runner.seconds()),
          .statistics = divergence_statistics(positions),
          .active_fraction = fraction};
}

TokenScores score_tokens(Transformer& model, std::span<const std::int32_t> ids, int top_n,
                         engine::Monitor& monitor, engine::Decoder* on_device) {
  const auto n_ids = static_cast<std::int64_t>(ids.size());
  const ModelConfig& config = model.config();
  require<InputError>(n_ids >= 1 && n_ids <= config.context_length,
                      "{} tokens to score, expected 1 to {}, the model's context length", n_ids,
                      config.context_length);
  require<InputError>(top_n >= 0 && top_n <= config.vocab_size,
                      "top: {} alternatives asked for, expected 0 to {}", top_n, config.vocab_size);
  check_ids(ids, config.vocab_size);
  const std::int64_t n_rows = top_n > 0 ? n_ids : n_ids - 1;
  TokenScores scores;
  scores.nll.resize(static_cast<std::size_t>(n_ids - 1));
  if (top_n > 0) scores.top.resize(static_cast<std::size_t>(n_ids));
  SequenceRunner runner(model, n_ids, 0, n_rows, on_device);
  monitor.stage("score", n_ids);
  runner.run(ids, monitor);
  for (std::int64_t first = 0; first < n_rows; first += runner.block_rows()) {
    monitor.check();
    const std::int64_t n = std::min(runner.block_rows(), n_rows - first);
    const ConstMatrix logits = runner.logits(first, n);
    for_rows(model.context().pool, n, [&](std::int64_t r) {
      const auto pos = static_cast<std::size_t>(first + r);
      const std::span<const float> values = row(logits, r);
      const double lse = checked_log_sum_exp(model, values);
      if (pos + 1 < ids.size()) {
        scores.nll[pos] = lse - values[static_cast<std::size_t>(ids[pos + 1])];
      }
      if (top_n > 0) {
        scores.top[pos].pos = first + r;
        top_logits(values, lse, static_cast<std::size_t>(top_n), scores.top[pos]);
      }
    });
    monitor.advance(std::min(first + n, n_ids), {});
  }
  return scores;
}

}  // namespace moesaic::models
