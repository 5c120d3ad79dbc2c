#include "models/evaluate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/base/error.h"
#include "tests/models/tiny_model.h"

namespace moesaic::models {
namespace {

// Only what evaluation asks of a tokenizer.
class FakeTokenizer : public Tokenizer {
 public:
  explicit FakeTokenizer(bool with_bos) {
    add_bos = with_bos;
    bos = 7;
  }
  std::vector<std::int32_t> encode(std::string_view, SpecialTokens) const override { return {}; }
  std::string piece(std::int32_t, bool) const override { return {}; }
  std::int64_t vocab_size() const override { return TinyModel::kVocab; }
};

struct Scored {
  std::vector<std::vector<double>> logprobs;  // at every scored position
  std::vector<std::int32_t> targets;
};

std::vector<double> log_softmax(const std::vector<double>& logits) {
  double sum = 0;
  for (const double x : logits) sum += std::exp(x);
  std::vector<double> result = logits;
  for (double& x : result) x -= std::log(sum);
  return result;
}

// llama-perplexity's convention, spelled out.
Scored score_chunks(const reference::Decoder& model, std::vector<std::int32_t> stream, bool bos,
                    std::size_t n_ctx, std::size_t n_chunks) {
  if (bos) stream.insert(stream.begin(), 7);
  Scored scored;
  for (std::size_t c = 0; c < std::min(n_chunks, stream.size() / n_ctx); ++c) {
    const auto begin = stream.begin() + static_cast<std::ptrdiff_t>(c * n_ctx);
    std::vector<std::int32_t> chunk(begin, begin + static_cast<std::ptrdiff_t>(n_ctx));
    const std::vector<std::int32_t> targets = chunk;
    if (bos) chunk[0] = 7;
    const auto logits = model.logits(chunk);
    for (std::size_t j = n_ctx / 2; j < n_ctx - 1; ++j) {
      scored.logprobs.push_back(log_softmax(logits[j]));
      scored.targets.push_back(targets[j + 1]);
    }
  }
  return scored;
}

std::vector<double> nll(const Scored& scored) {
  std::vector<double> result;
  for (std::size_t i = 0; i < scored.targets.size(); ++i) {
    result.push_back(-scored.logprobs[i][static_cast<std::size_t>(scored.targets[i])]);
  }
  return result;
}

double mean(const std::vector<double>& x) {
  return std::accumulate(x.begin(), x.end(), 0.0) / static_cast<double>(x.size());
}

double standard_error(const std::vector<double>& x) {
  double squares = 0;
  for (const double v : x) squares += (v - mean(x)) * (v - mean(x));
  const auto n = static_cast<double>(x.size());
  return std::sqrt(squares / n / (n - 1));
}

void expect_perplexity(const Perplexity& found, const Scored& scored) {
  const std::vector<double> losses = nll(scored);
  const double expected = std::exp(mean(losses));
  EXPECT_NEAR(found.perplexity, expected, 1e-4 * expected);
  EXPECT_NEAR(found.perplexity_stderr, expected * standard_error(losses), 1e-3 * expected);
  EXPECT_EQ(found.n_tokens_scored, static_cast<std::int64_t>(losses.size()));
  EXPECT_GT(found.tokens_per_second, 0);
}

TEST(Perplexity, ChunksAsLlamaPerplexityCutsThem) {
  const TinyModel tiny({});
  const auto ids = random_ids(50);
  for (const bool bos : {false, true}) {
    for (const std::int64_t n_ctx : {16, 17, 50}) {
      TestContext test;
      Transformer model(tiny.load(), test.context);
      engine::Monitor monitor;
      const Perplexity found = evaluate_perplexity(model, FakeTokenizer(bos), ids,
                                                   {.n_ctx = n_ctx, .n_chunks = -1}, monitor);
      EXPECT_EQ(found.n_ctx, n_ctx);
      EXPECT_EQ(found.n_chunks, (50 + (bos ? 1 : 0)) / n_ctx);
      expect_perplexity(
          found, score_chunks(tiny.reference, ids, bos, static_cast<std::size_t>(n_ctx), 1000));
    }
  }
}

TEST(Perplexity, FirstChunksOnly) {
  const TinyModel tiny({.architecture = "gemma3", .window = 6});
  const auto ids = random_ids(60);
  TestContext test;
  Transformer model(tiny.load(), test.context);
  engine::Monitor monitor;
  const Perplexity found =
      evaluate_perplexity(model, FakeTokenizer(true), ids, {.n_ctx = 16, .n_chunks = 2}, monitor);
  EXPECT_EQ(found.n_chunks, 2);
  expect_perplexity(found, score_chunks(tiny.reference, ids, true, 16, 2));
}

TEST(Perplexity, BosCountsTowardsTheFirstChunk) {
  const TinyModel tiny({});
  TestContext test;
  Transformer model(tiny.load(), test.context);
  engine::Monitor monitor;
  const auto ids = random_ids(15);
  EXPECT_EQ(evaluate_perplexity(model, FakeTokenizer(true), ids, {.n_ctx = 16}, monitor).n_chunks,
            1);
  try {
    evaluate_perplexity(model, FakeTokenizer(false), ids, {.n_ctx = 16}, monitor);
    FAIL() << "15 tokens made a chunk of 16";
  } catch (const InputError& e) {
    EXPECT_STREQ(e.what(), "the text has 15 tokens, expected at least 16, one chunk");
  }
}

TEST(Perplexity, OptionsOutOfRangeAreRefused) {
  const TinyModel tiny({});
  TestContext test;
  Transformer model(tiny.load(), test.context);
  engine::Monitor monitor;
  const FakeTokenizer tokenizer(false);
  const auto ids = random_ids(600);
  const auto run = [&](const ChunkOptions& options) {
    evaluate_perplexity(model, tokenizer, ids, options, monitor);
  };
  EXPECT_THROW(run({.n_ctx = 3}), InputError);
  EXPECT_THROW(run({.n_ctx = 257}), InputError);  // the model's context is 256
  EXPECT_THROW(run({.n_ctx = 16, .n_chunks = 0}), InputError);
  auto bad = ids;
  bad[5] = TinyModel::kVocab;
  EXPECT_THROW(evaluate_perplexity(model, tokenizer, bad, {.n_ctx = 16}, monitor), InputError);
}

TEST(Perplexity, ReportsEveryChunkAndStopsWhenAsked) {
  class Stopping : public engine::Monitor {
   public:
    void stage(std::string_view, std::int64_t total) override { stage_total = total; }
    void advance(std::int64_t n, std::string_view note) override {
      done = n;
      EXPECT_TRUE(note.starts_with("ppl ")) << note;
    }
    bool cancelled() const override { return done == 2; }
    std::int64_t stage_total = 0, done = 0;
  };
  const TinyModel tiny({});
  TestContext test;
  Transformer model(tiny.load(), test.context);
  Stopping monitor;
  EXPECT_THROW(
      evaluate_perplexity(model, FakeTokenizer(false), random_ids(100), {.n_ctx = 16}, monitor),
      Interrupted);
  EXPECT_EQ(monitor.stage_total, 6);
  EXPECT_EQ(monitor.done, 2);
}

TEST(Perplexity, DoesNotDependOnTheNumberOfThreads) {
  const TinyModel tiny({});
  const auto ids = random_ids(64);
  engine::Monitor monitor;
  std::vector<double> found;
  for (const int n_threads : {1, 2, 3}) {
    TestContext test(n_threads);
    Transformer model(tiny.load(), test.context);
    found.push_back(
        evaluate_perplexity(model, FakeTokenizer(false), ids, {.n_ctx = 16}, monitor).perplexity);
  }
  EXPECT_NEAR(found[0], found[1], 1e-5 * found[0]);
  EXPECT_NEAR(found[0], found[2], 1e-5 * found[0]);
}

TEST(Divergence, EqualsTheLoops) {
  const TinyModel a({.seed = 1});
  const TinyModel b({.moe_layers = {1}, .seed = 1});
  const auto ids = random_ids(70);
  TestContext test;
  Transformer dense(a.load(), test.context), hybrid(b.load(), test.context);
  engine::Monitor monitor;
  const Divergence found = evaluate_divergence(dense, hybrid, FakeTokenizer(true), ids,
                                               {.n_ctx = 16, .n_chunks = 4}, monitor);
  const Scored p = score_chunks(a.reference, ids, true, 16, 4);
  const Scored q = score_chunks(b.reference, ids, true, 16, 4);
  expect_perplexity(found.dense, p);
  expect_perplexity(found.hybrid, q);
  std::vector<double> kl;
  double same = 0;
  for (std::size_t i = 0; i < p.logprobs.size(); ++i) {
    double sum = 0;
    for (std::size_t v = 0; v < p.logprobs[i].size(); ++v) {
      sum += std::exp(p.logprobs[i][v]) * (p.logprobs[i][v] - q.logprobs[i][v]);
    }
    kl.push_back(sum);
    const auto top = [](const std::vector<double>& x) {
      return std::max_element(x.begin(), x.end()) - x.begin();
    };
    same += top(p.logprobs[i]) == top(q.logprobs[i]) ? 1 : 0;
  }
  // Every layer of every token, the last one's too, of which only half the rows are scored.
  EXPECT_NEAR(found.active_fraction.value(), hybrid.checkpoint().active_fraction(), 1e-12);
  const DivergenceStatistics& s = found.statistics;
  EXPECT_EQ(s.n_tokens, static_cast<std::int64_t>(kl.size()));
  EXPECT_NEAR(s.kl.value, mean(kl), 1e-4 * mean(kl));
  EXPECT_NEAR(s.kl.stderror, standard_error(kl), 1e-3 * mean(kl));
  EXPECT_DOUBLE_EQ(s.same_top.value, same / static_cast<double>(kl.size()));
  const std::vector<double> of_p = nll(p), of_q = nll(q);
  std::vector<double> delta_p;
  for (std::size_t i = 0; i < of_p.size(); ++i) {
    delta_p.push_back(std::exp(-of_q[i]) - std::exp(-of_p[i]));
  }
  EXPECT_NEAR(s.delta_p.value, mean(delta_p), 1e-4);
  EXPECT_NEAR(s.delta_p_quantiles.max, *std::max_element(delta_p.begin(), delta_p.end()), 1e-4);
  EXPECT_NEAR(s.perplexity_base.value, found.dense.perplexity, 1e-9 * found.dense.perplexity);
  EXPECT_NEAR(s.perplexity_q.value, found.hybrid.perplexity, 1e-9 * found.hybrid.perplexity);
  EXPECT_NEAR(s.perplexity_ratio.value, std::exp(mean(of_q) - mean(of_p)), 1e-3);
}

TEST(Divergence, OfAModelFromItselfIsZero) {
  const TinyModel tiny({});
  TestContext test;
  Transformer one(tiny.load(), test.context), two(tiny.load(), test.context);
  engine::Monitor monitor;
  const Divergence found =
      evaluate_divergence(one, two, FakeTokenizer(false), random_ids(40), {.n_ctx = 16}, monitor);
  EXPECT_EQ(found.active_fraction.value(), 1);
  EXPECT_EQ(found.statistics.kl.value, 0);
  EXPECT_EQ(found.statistics.kl_quantiles.max, 0);
  EXPECT_EQ(found.statistics.rms_delta_p.value, 0);
  EXPECT_EQ(found.statistics.same_top.value, 1);
  EXPECT_EQ(found.dense.perplexity, found.hybrid.perplexity);
}

// n_ctx 4 scores one token a chunk.
TEST(Divergence, OfOneChunkAndOneToken) {
  const TinyModel a({}), b({.moe_layers = {1}});
  TestContext test;
  Transformer dense(a.load(), test.context), hybrid(b.load(), test.context);
  engine::Monitor monitor;
  const Divergence found = evaluate_divergence(dense, hybrid, FakeTokenizer(false), random_ids(4),
                                               {.n_ctx = 4}, monitor);
  EXPECT_EQ(found.dense.n_chunks, 1);
  EXPECT_EQ(found.statistics.n_tokens, 1);
  EXPECT_EQ(found.statistics.kl.value, found.statistics.kl_quantiles.max);
  EXPECT_EQ(found.statistics.kl.stderror, 0);
}

TEST(ScoreTokens, EqualsTheLoops) {
  const TinyModel tiny({});
  const auto ids = random_ids(30);
  const auto logits = tiny.reference.logits(ids);
  TestContext test;
  Transformer model(tiny.load(), test.context);
  engine::Monitor monitor;
  const TokenScores scores = score_tokens(model, ids, 5, monitor);
  ASSERT_EQ(scores.nll.size(), 29U);
  ASSERT_EQ(scores.top.size(), 30U);
  for (std::size_t t = 0; t < ids.size(); ++t) {
    const std::vector<double> logprob = log_softmax(logits[t]);
    if (t + 1 < ids.size()) {
      EXPECT_NEAR(scores.nll[t], -logprob[static_cast<std::size_t>(ids[t + 1])], 1e-3);
    }
    EXPECT_EQ(scores.top[t].pos, static_cast<std::int64_t>(t));
    ASSERT_EQ(scores.top[t].ids.size(), 5U);
    std::vector<double> sorted = logprob;
    std::sort(sorted.rbegin(), sorted.rend());
    for (std::size_t i = 0; i < 5; ++i) {
      EXPECT_NEAR(scores.top[t].logprob[i], sorted[i], 1e-3);
      EXPECT_NEAR(logprob[static_cast<std::size_t>(scores.top[t].ids[i])], sorted[i], 1e-3);
    }
  }
  EXPECT_TRUE(score_tokens(model, ids, 0, monitor).top.empty());
}

TEST(ScoreTokens, LengthsFromOneToTheContext) {
  const TinyModel tiny({});
  TestContext test;
  Transformer model(tiny.load(), test.context);
  engine::Monitor monitor;
  EXPECT_TRUE(score_tokens(model, random_ids(1), 0, monitor).nll.empty());
  EXPECT_EQ(score_tokens(model, random_ids(1), 80, monitor).top[0].ids.size(), 80U);
  EXPECT_EQ(score_tokens(model, random_ids(256), 0, monitor).nll.size(), 255U);
  EXPECT_THROW(score_tokens(model, random_ids(257), 0, monitor), InputError);
  EXPECT_THROW(score_tokens(model, {}, 0, monitor), InputError);
  EXPECT_THROW(score_tokens(model, random_ids(4), 81, monitor), InputError);
  EXPECT_THROW(score_tokens(model, random_ids(4), -1, monitor), InputError);
  EXPECT_THROW(score_tokens(model, std::vector<std::int32_t>{1, 80}, 0, monitor), InputError);
}

}  // namespace
}  // namespace moesaic::models
