// --device cuda: the program as built, on a GPU or on the stand-in for one.

#include <gtest/gtest.h>

#include "tests/models/tiny_self_routed.h"
#include "tests/tools/on_cuda.h"

namespace moesaic::tools {
namespace {

using models::TinyModel;
using models::TinyOptions;

class OnCuda : public OnCudaDevice, public testing::WithParamInterface<TinyOptions> {};

TEST_P(OnCuda, GreedyTokensEqualTheCpus) {
  const TinyModel model(GetParam(), [](TinyModel& m) { add_vocabulary(m); });
  std::vector<std::string> line = {
      "generate", model.path.string(), "-p",  "the river",    "-n", "64", "--temp", "0", "-o",
      "json",     "--activations",     "f32", "--ignore-eos", "-q"};
  const ProgramRun cpu = run_program(line);
  line.insert(line.end(), {"--device", "cuda"});
  const ProgramRun gpu = run_program(line);
  ASSERT_EQ(cpu.status, 0) << cpu.err;
  ASSERT_EQ(gpu.status, 0) << gpu.err;
  EXPECT_EQ(gpu.err, "");
  EXPECT_EQ(gpu.json()["tokens"].size(), 64u);
  EXPECT_EQ(gpu.json()["tokens"], cpu.json()["tokens"]);
  EXPECT_EQ(gpu.json()["text"], cpu.json()["text"]);
}

INSTANTIATE_TEST_SUITE_P(
    Models, OnCuda,
    testing::Values(TinyOptions{.architecture = "llama", .dtype = DType::Q8_0},
                    TinyOptions{.architecture = "gemma3", .window = 8},
                    TinyOptions{.architecture = "llama", .dtype = DType::Q4_1, .moe_layers = {1}}),
    [](const auto& instance) {
      return instance.param.architecture + (instance.param.moe_layers.empty() ? "" : "Hybrid");
    });

// A prompt of more than 64 tokens goes through tensor cores; tokens are drawn on the device.
TEST_F(OnCudaDevice, LongPromptsAndDrawnTokensEqualTheCpus) {
  const TinyModel model({.dtype = DType::Q8_0}, [](TinyModel& m) { add_vocabulary(m); });
  const auto tokens = [&](const std::string& prompt, const std::vector<std::string>& more) {
    std::vector<std::string> line = {
        "generate", model.path.string(), "-p",  prompt,         "-n", "16", "-o",
        "json",     "--activations",     "f32", "--ignore-eos", "-q"};
    line.insert(line.end(), more.begin(), more.end());
    const ProgramRun cpu = run_program(line);
    line.insert(line.end(), {"--device", "cuda"});
    const ProgramRun gpu = run_program(line);
    EXPECT_EQ(gpu.status, 0) << gpu.err;
    EXPECT_EQ(gpu.json()["tokens"], cpu.json()["tokens"]);
    return gpu.json()["prompt_tokens"].get<int>();
  };
  EXPECT_GT(tokens(words(100), {"--temp", "0"}), 64);
  tokens("the river", {"--seed", "5", "--temp", "10", "--min-p", "0", "--top-p", "1"});
  tokens("the river", {"--seed", "6", "--temp", "10", "--repeat-penalty", "1.2"});
}

TEST_F(OnCudaDevice, SequencesOfABatchEqualTheCpus) {
  const TinyModel model({.moe_layers = {0}}, [](TinyModel& m) { add_vocabulary(m); });
  const TemporaryFolder folder;
  const std::string batch = folder.write("batch.jsonl",
                                         "{\"prompt\": \"north\"}\n{\"prompt\": \"a red fox\"}\n"
                                         "{\"prompt\": \"two\", \"max_tokens\": 3}\n");
  std::vector<std::string> line = {
      "generate", model.path.string(), "--batch", batch, "-n", "12", "--temp",
      "0",        "--activations",     "f32",     "-q"};
  const ProgramRun cpu = run_program(line);
  line.insert(line.end(), {"--device", "cuda:0"});
  const ProgramRun gpu = run_program(line);
  ASSERT_EQ(gpu.status, 0) << gpu.err;
  EXPECT_EQ(gpu.out, cpu.out);
}

TEST_F(OnCudaDevice, EvalAndScoreEqualTheCpus) {
  const TinyModel model({.dtype = DType::Q8_0}, [](TinyModel& m) {
    add_vocabulary(m);
    models::add_self_routed(m, {"glu+gate", "glu+input"}, 0.1F, 0.4F);
  });
  const TemporaryFolder folder;
  std::vector<std::string> eval = {"eval",    model.path.string(),
                                   "--data",  folder.write("text.txt", words(400)),
                                   "--n-ctx", "48",
                                   "-o",      "json",
                                   "-q",      "--activations",
                                   "f32"};
  std::vector<std::string> score = {"score", model.path.string(),
                                    "--ids", folder.write("ids.json", "[5, 9, 1, 40, 7, 7]"),
                                    "--top", "3",
                                    "-q"};
  const ProgramRun cpu = run_program(eval), scored = run_program(score);
  for (auto* line : {&eval, &score}) line->insert(line->end(), {"--device", "cuda"});
  const ProgramRun gpu = run_program(eval), scored_on_gpu = run_program(score);
  ASSERT_EQ(gpu.status, 0) << gpu.err;
  ASSERT_EQ(scored_on_gpu.status, 0) << scored_on_gpu.err;
  const double perplexity = cpu.json()["perplexity"].get<double>();
  EXPECT_NEAR(gpu.json()["perplexity"].get<double>(), perplexity, 1e-4 * perplexity);
  EXPECT_EQ(gpu.json()["n_tokens_scored"], cpu.json()["n_tokens_scored"]);
  const nlohmann::json a = scored.json(), b = scored_on_gpu.json();
  ASSERT_EQ(b["nll"].size(), 5u);
  for (std::size_t i = 0; i < 5; ++i) {
    EXPECT_NEAR(b["nll"][i].get<double>(), a["nll"][i].get<double>(), 1e-4);
    EXPECT_EQ(b["top"][i]["ids"], a["top"][i]["ids"]);
  }
}

TEST_F(OnCudaDevice, CompareEqualsTheCpus) {
  // Short prompts and generations, and another model's weights, so that there is a divergence.
  const auto prepare = [](TinyModel& m) {
    add_vocabulary(m);
    m.set("llama.context_length", models::GgufValue::u32(48));
  };
  const TinyModel dense({.dtype = DType::Q8_0}, prepare);
  const TinyModel hybrid({.dtype = DType::Q8_0, .seed = 2}, [&](TinyModel& m) {
    prepare(m);
    models::add_self_routed(m, {"glu+gate", "dense"}, 0.1F, 0.4F);
  });
  const TemporaryFolder folder;
  const std::string file = (folder.path() / "gpu.compare.json").string();
  std::vector<std::string> line = {"compare",
                                   dense.path.string(),
                                   hybrid.path.string(),
                                   "--data",
                                   folder.write("text.txt", words(300)),
                                   "--n-ctx",
                                   "48",
                                   "--chunks",
                                   "2",
                                   "-r",
                                   "1",
                                   "-o",
                                   "json",
                                   "-q",
                                   "--activations",
                                   "f32"};
  const ProgramRun cpu = run_program(line);
  line.insert(line.end(), {"--device", "cuda", "--json-file", file});
  const ProgramRun gpu = run_program(line);
  ASSERT_EQ(cpu.status, 0) << cpu.err;
  ASSERT_EQ(gpu.status, 0) << gpu.err;
  EXPECT_EQ(gpu.err, "");
  const nlohmann::json a = cpu.json(), b = gpu.json();
  const auto near = [&](const char* pointer, double tolerance) {
    const nlohmann::json::json_pointer at(pointer);
    EXPECT_NEAR(b[at].get<double>(), a[at].get<double>(), tolerance) << pointer;
  };
  const double perplexity = a["dense"]["perplexity"].get<double>();
  near("/dense/perplexity", 1e-4 * perplexity);
  near("/hybrid/perplexity", 1e-4 * perplexity);
  const double kl = a["kl_mean"].get<double>();
  EXPECT_GT(kl, 1e-5);
  near("/kl_mean", 1e-3 * kl);
  near("/top1_agreement", 0);
  near("/n_tokens_scored", 0);
  near("/hybrid/active_fraction", 0);
  near("/texts/0/ppl_ratio", 1e-4);
  near("/texts/0/kl/p90", 1e-3 * kl);
  EXPECT_EQ(b["device"], "cuda");
  EXPECT_TRUE(b["dense"]["bytes_per_token"].is_null());
  EXPECT_TRUE(b["texts"][0]["active_fraction"].is_null());
  EXPECT_GT(b["hybrid"]["decode_tps"].get<double>(), 0);
  EXPECT_GT(b["hybrid"]["resident_bytes"].get<double>(), 1 << 20);
  // report reads what was not counted as what the file describes.
  const ProgramRun report = run_program({"report", folder.path().string(), "-o", "json"});
  ASSERT_EQ(report.status, 0) << report.err;
  EXPECT_NE(report.out.find("gpu.compare.json"), std::string::npos) << report.out;
}

TEST_F(OnCudaDevice, BenchTellsSpeedsAndNoLimits) {
  const TinyModel model({}, [](TinyModel& m) { add_vocabulary(m); });
  std::vector<std::string> line = {"bench", model.path.string(), "-p",   "8", "-n", "4", "-r",
                                   "2",     "--device",          "cuda", "-q"};
  const ProgramRun table = run_program(line);
  ASSERT_EQ(table.status, 0) << table.err;
  EXPECT_NE(table.out.find("CUDA"), std::string::npos) << table.out;
  line.insert(line.end(), {"-o", "json"});
  const nlohmann::json rows = run_program(line).json();
  ASSERT_EQ(rows.size(), 2u);
  for (const auto& row : rows) {
    EXPECT_EQ(row["backends"], "CUDA");
    EXPECT_GT(row["avg_ts"].get<double>(), 0);
    EXPECT_TRUE(row["bytes_per_token"].is_null());
  }
  line.insert(line.end(), {"--costs"});
  EXPECT_EQ(run_program(line).status, 2);
}

}  // namespace
}  // namespace moesaic::tools
