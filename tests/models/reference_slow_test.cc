#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <thread>

#include "engine/generation.h"
#include "models/evaluate.h"
#include "models/tokenizer.h"
#include "models/transformer.h"
#include "tests/models/small_vocabulary.h"

namespace moesaic::models {
namespace {

namespace fs = std::filesystem;

nlohmann::json read_json(const fs::path& path) {
  std::ifstream in(path);
  return nlohmann::json::parse(in);
}

struct Model {
  std::string name;  // in shared/reference
  std::string file;  // in the cache folder
};

// The two checkpoints against what independent implementations computed (shared/reference).
class ReferenceOf : public ::testing::TestWithParam<Model> {
 protected:
  void SetUp() override {
    checkpoint_path_ = testing::checkpoint_path(GetParam().file);
    reference_ = testing::shared_path("reference");
    for (const fs::path& path : {checkpoint_path_, reference_ / "perplexity.json"}) {
      if (!fs::exists(path)) GTEST_SKIP() << path.string() << " is not there";
    }
    pool_.emplace(static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1U, 8U)));
  }

  Transformer& load(Activations activations) {
    context_.emplace(Context{*pool_, workspace_, tally_, activations});
    return model_.emplace(Checkpoint::load(checkpoint_path_), *context_);
  }
  nlohmann::json logprobs() const {
    return read_json(reference_ / (GetParam().name + ".logprobs.json"));
  }

  // The first n chunks of WikiText's test split, by the reference's own ids.
  void check_perplexity(Activations activations, int n_chunks) {
    Transformer& model = load(activations);
    std::ifstream in(reference_ / (GetParam().name + ".wiki.test.u32"), std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(in), {}};
    std::vector<std::int32_t> ids(bytes.size() / 4);
    std::memcpy(ids.data(), bytes.data(), ids.size() * 4);
    const auto tokenizer = load_tokenizer(*model.checkpoint().file);
    engine::Monitor monitor;
    const Perplexity found =
        evaluate_perplexity(model, *tokenizer, ids, {.n_ctx = 512, .n_chunks = n_chunks}, monitor);
    const double expected = read_json(
        reference_ / "perplexity.json")[GetParam().name]["chunks" + std::to_string(n_chunks)];
    RecordProperty("perplexity", std::to_string(found.perplexity));
    RecordProperty("tokens_per_second", std::to_string(found.tokens_per_second));
    EXPECT_NEAR(found.perplexity, expected, 0.005 * expected);
    EXPECT_EQ(found.n_chunks, n_chunks);
    EXPECT_EQ(found.n_tokens_scored, 255 * n_chunks);
  }

  fs::path checkpoint_path_, reference_;
  std::optional<ThreadPool> pool_;
  Workspace workspace_;
  Tally tally_;
  std::optional<Context> context_;
  std::optional<Transformer> model_;
};

TEST_P(ReferenceOf, LogProbabilities) {
  Transformer& model = load(Activations::F32);
  const nlohmann::json expected = logprobs();
  const std::vector<std::int32_t> ids = expected["input_ids"];
  const std::vector<double> nll = expected["nll"];
  engine::Monitor monitor;
  // All alternatives, so that the reference's ids are found however near-ties fall.
  const TokenScores scores = score_tokens(model, ids, 200, monitor);
  ASSERT_EQ(scores.nll.size(), nll.size());
  double worst = 0;
  for (std::size_t i = 0; i < nll.size(); ++i) {
    EXPECT_NEAR(scores.nll[i], nll[i], 2e-3) << "token " << i + 1;
    worst = std::max(worst, std::abs(scores.nll[i] - nll[i]));
  }
  double worst_top = 0;
  for (const nlohmann::json& top : expected["top8"]) {
    const TokenScores::Top& found = scores.top[top["pos"].get<std::size_t>()];
    const std::vector<std::int32_t> top_ids = top["ids"];
    const std::vector<double> logprob = top["logprob"];
    for (std::size_t i = 0; i < top_ids.size(); ++i) {
      const auto at = std::find(found.ids.begin(), found.ids.end(), top_ids[i]);
      ASSERT_NE(at, found.ids.end()) << "position " << found.pos << ", id " << top_ids[i];
      const double value = found.logprob[static_cast<std::size_t>(at - found.ids.begin())];
      EXPECT_NEAR(value, logprob[i], 2e-3) << "position " << found.pos << ", id " << top_ids[i];
      worst_top = std::max(worst_top, std::abs(value - logprob[i]));
    }
  }
  RecordProperty("worst_nll", std::to_string(worst));
  RecordProperty("worst_top8", std::to_string(worst_top));
}

TEST_P(ReferenceOf, GreedyContinuations) {
  Transformer& model = load(Activations::F32);
  const nlohmann::json expected = logprobs();
  std::vector<engine::Request> requests;
  std::vector<std::vector<std::int32_t>> continuations;
  for (const nlohmann::json& entry : expected["greedy"]) {
    engine::Request request;
    request.prompt = entry["prompt_ids"].get<std::vector<std::int32_t>>();
    continuations.push_back(entry["greedy_ids"]);
    request.max_tokens = static_cast<int>(continuations.back().size());
    request.sampling.temperature = 0;
    requests.push_back(request);
  }
  for (const int n_parallel : {1, 5}) {
    const auto found = engine::generate(model, requests, [](std::int32_t) { return std::string(); },
                                        {.n_parallel = n_parallel});
    for (std::size_t i = 0; i < found.size(); ++i) {
      EXPECT_EQ(found[i].tokens, continuations[i]) << expected["greedy"][i]["prompt"];
    }
  }
}

TEST_P(ReferenceOf, Perplexity20ChunksF32) { check_perplexity(Activations::F32, 20); }

TEST_P(ReferenceOf, Perplexity20ChunksBf16) { check_perplexity(Activations::BF16, 20); }

class LongReferenceOf : public ReferenceOf {};
TEST_P(LongReferenceOf, Perplexity40ChunksF32) { check_perplexity(Activations::F32, 40); }

const auto kCheckpoints =
    ::testing::Values(Model{"smollm2-135m", "SmolLM2-135M-Instruct.Q4_1.gguf"},
                      Model{"gemma-3-270m", "gemma-3-270m-Q4_K_M.gguf"});
std::string name_of(const ::testing::TestParamInfo<Model>& instance) {
  return instance.param.name.substr(0, instance.param.name.find('-'));
}
INSTANTIATE_TEST_SUITE_P(Checkpoints, ReferenceOf, kCheckpoints, name_of);
INSTANTIATE_TEST_SUITE_P(Checkpoints, LongReferenceOf, kCheckpoints, name_of);

}  // namespace
}  // namespace moesaic::models
