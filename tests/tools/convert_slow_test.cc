// convert, compare and generate on real checkpoints, with few tokens.

#include <gtest/gtest.h>

#include <fstream>

#include "tests/models/small_vocabulary.h"
#include "tests/tools/program.h"

namespace moesaic::tools {
namespace {

class ConvertReal : public testing::TestWithParam<const char*> {};

TEST_P(ConvertReal, ConvertsComparesGenerates) {
  const std::filesystem::path model = models::testing::checkpoint_path(GetParam());
  if (!std::filesystem::exists(model)) GTEST_SKIP() << model.string() << " is not there";
  const TemporaryFolder folder;
  const std::string hybrid = (folder.path() / "hybrid.gguf").string();
  const ProgramRun converted =
      run_program({"convert", model, "-o", hybrid, "--data", "self", "--tokens", "6144", "--active",
                   "0.7", "--recipe", "low-rank", "-q"});
  ASSERT_EQ(converted.status, 0) << converted.err;
  const auto report = nlohmann::json::parse(std::ifstream(hybrid + ".report.json"));
  EXPECT_LE(report["active_fraction"].get<double>(), 0.7);
  EXPECT_LT(report["peak_memory_bytes"].get<std::int64_t>(), std::int64_t{4} << 30);

  const std::string prose = std::string(MOESAIC_SOURCE_DIR) + "/README.md";
  const ProgramRun compared = run_program(
      {"compare", model, hybrid, "--data", prose, "--chunks", "2", "-r", "1", "-o", "json", "-q"});
  ASSERT_EQ(compared.status, 0) << compared.err;
  const nlohmann::json table = compared.json();
  const double ratio =
      table["hybrid"]["perplexity"].get<double>() / table["dense"]["perplexity"].get<double>();
  RecordProperty("perplexity_ratio", std::to_string(ratio));
  EXPECT_LT(ratio, 2);
  EXPECT_GT(table["kl_mean"].get<double>(), 0);
  EXPECT_GT(table["top1_agreement"].get<double>(), 0.5);
  EXPECT_LT(table["hybrid"]["bytes_per_token"].get<double>(),
            table["dense"]["bytes_per_token"].get<double>());

  const ProgramRun said = run_program(
      {"generate", hybrid, "-p", "The capital of France is", "-n", "8", "--temp", "0", "-q"});
  EXPECT_EQ(said.status, 0) << said.err;
  EXPECT_GT(said.out.size(), 8U);
}

// The default recipe, from a plan, so that nothing is measured: the work is in the thresholds.
TEST_P(ConvertReal, SelfRoutedByAPlan) {
  const std::filesystem::path model = models::testing::checkpoint_path(GetParam());
  if (!std::filesystem::exists(model)) GTEST_SKIP() << model.string() << " is not there";
  const TemporaryFolder folder;
  const std::string hybrid = (folder.path() / "hybrid.gguf").string();
  const auto n_layers = models::Checkpoint::load(model)->config.n_layers;
  nlohmann::json plan = {{"moesaic_plan", 1}, {"kind", "glu+gate"}, {"layers", {}}};
  for (int l = 0; l < n_layers; ++l) {
    plan["layers"].push_back(
        {{"layer", l}, {"input_share", 0.7}, {"gate_share", 0.65}, {"hidden_share", 0.45}});
  }
  const std::string plan_file = folder.write("plan.json", plan.dump());
  const std::string prose = std::string(MOESAIC_SOURCE_DIR) + "/README.md";
  const ProgramRun converted = run_program({"convert", model, "-o", hybrid, "--data", prose,
                                            "--tokens", "6144", "--plan", plan_file, "-q"});
  ASSERT_EQ(converted.status, 0) << converted.err;
  const auto report = nlohmann::json::parse(std::ifstream(hybrid + ".report.json"));
  EXPECT_NEAR(report["active_fraction"].get<double>(), 0.6, 0.01);
  const ProgramRun compared = run_program(
      {"compare", model, hybrid, "--data", prose, "--chunks", "2", "-r", "1", "-o", "json", "-q"});
  ASSERT_EQ(compared.status, 0) << compared.err;
  const nlohmann::json table = compared.json();
  const double ratio =
      table["hybrid"]["perplexity"].get<double>() / table["dense"]["perplexity"].get<double>();
  RecordProperty("perplexity_ratio", std::to_string(ratio));
  EXPECT_LT(ratio, 1.35);
  EXPECT_GT(table["kl_mean"].get<double>(), 0);
}

INSTANTIATE_TEST_SUITE_P(SmolLM2, ConvertReal, testing::Values("SmolLM2-135M-Instruct.Q4_1.gguf"));
INSTANTIATE_TEST_SUITE_P(LongGemma, ConvertReal, testing::Values("gemma-3-270m-Q4_K_M.gguf"));

}  // namespace
}  // namespace moesaic::tools
