// generate --device cuda on a real checkpoint and its hybrids, on a GPU or on the stand-in for one.

#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/models/small_vocabulary.h"
#include "tests/tools/program.h"

namespace moesaic::tools {
namespace {

class SmolLM2OnCuda : public testing::Test {
 protected:
  void SetUp() override {
    model_ = models::testing::checkpoint_path("SmolLM2-135M-Instruct.Q4_1.gguf");
    if (!std::filesystem::exists(model_)) GTEST_SKIP() << model_.string() << " is not there";
    if (std::getenv("MOESAIC_CUDA_TESTS") == nullptr) GTEST_SKIP() << "no CUDA device";
  }

  // Converts by a recipe that takes little time, and returns the hybrid.
  std::string convert(const std::vector<std::string>& how) {
    const std::string hybrid = (folder_.path() / "hybrid.gguf").string();
    std::vector<std::string> line = {"convert", model_.string(), "-o", hybrid, "-q"};
    line.insert(line.end(), how.begin(), how.end());
    const ProgramRun converted = run_program(line);
    EXPECT_EQ(converted.status, 0) << converted.err;
    return hybrid;
  }

  // The first four greedy tokens are the CPU's.
  static void expect_same_tokens(const std::string& checkpoint) {
    std::vector<std::string> line = {
        "generate", checkpoint,      "-p",  "The capital of", "-n", "4", "--temp", "0", "-o",
        "json",     "--activations", "f32", "--ignore-eos",   "-q"};
    const ProgramRun cpu = run_program(line);
    line.insert(line.end(), {"--device", "cuda"});
    const ProgramRun gpu = run_program(line);
    ASSERT_EQ(cpu.status, 0) << cpu.err;
    ASSERT_EQ(gpu.status, 0) << gpu.err;
    EXPECT_EQ(gpu.json()["tokens"].size(), 4u);
    EXPECT_EQ(gpu.json()["tokens"], cpu.json()["tokens"]);
  }

  std::filesystem::path model_;
  TemporaryFolder folder_;
};

TEST_F(SmolLM2OnCuda, Dense) { expect_same_tokens(model_.string()); }

// Shares as `convert --active 0.5` plans them on average.
TEST_F(SmolLM2OnCuda, SelfRouted) {
  for (const char* kind : {"glu+gate", "glu+input"}) {
    nlohmann::json plan = {{"moesaic_plan", 1}, {"kind", kind}, {"layers", {}}};
    for (int l = 0; l < 30; ++l) {
      nlohmann::json layer = {{"layer", l}, {"input_share", 0.6}, {"hidden_share", 0.35}};
      if (std::string(kind) == "glu+gate") layer["gate_share"] = 0.5;
      plan["layers"].push_back(layer);
    }
    expect_same_tokens(
        convert({"--data", std::string(MOESAIC_SOURCE_DIR) + "/README.md", "--tokens", "2048",
                 "--plan", folder_.write("plan.json", plan.dump())}));
  }
}

// Two layers: fitting all of them takes many minutes.
TEST_F(SmolLM2OnCuda, LowRank) {
  expect_same_tokens(
      convert({"--data", std::string(MOESAIC_SOURCE_DIR) + "/README.md", "--tokens", "2048",
               "--recipe", "low-rank", "--layers", "14-15", "--budget", "uniform"}));
}

}  // namespace
}  // namespace moesaic::tools
