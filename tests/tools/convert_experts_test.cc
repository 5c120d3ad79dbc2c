// convert --recipe low-rank with more experts than neurons, and with experts of several neurons.

#include <gtest/gtest.h>

#include <algorithm>
#include <csignal>
#include <fstream>

#include "tests/tools/program.h"

namespace moesaic::tools {
namespace {

using models::TinyModel;
using nlohmann::json;

// d_model 64, d_ff 96: 8 neurons are shared, 88 are left for experts.
class ConvertExperts : public testing::Test {
 protected:
  std::vector<std::string> line(const std::string& output,
                                std::vector<std::string> more = {}) const {
    std::vector<std::string> all = {"convert", model_.path, "-o",       output,     "--data",
                                    text_,     "--tokens",  "4096",     "--active", "0.6",
                                    "-t",      "2",         "--recipe", "low-rank"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  void refused(std::vector<std::string> more, int status, const char* says) const {
    more.emplace_back("-q");
    expect_one_line_error(run_program(line(output_, more)), status, says);
    EXPECT_FALSE(std::filesystem::exists(output_ + ".state"));
  }

  TinyModel model_{{.n_layers = 3}, [](TinyModel& m) { add_vocabulary(m); }};
  TemporaryFolder folder_;
  std::string text_ = folder_.write("text.txt", words(30000));
  std::string output_ = (folder_.path() / "hybrid.gguf").string();
};

TEST_F(ConvertExperts, BlocksAndClonesMakeFilesThatRun) {
  struct Case {
    std::vector<std::string> options;
    const char* kind;
    int n_experts, neurons;
  };
  const Case cases[] = {{{"--block", "4"}, "glu+low_rank+none", 22, 4},
                        {{"--experts", "192"}, "glu+low_rank", 192, 1},
                        {{"--block", "4", "--experts", "30"}, "glu+low_rank+none", 30, 4}};
  for (const Case& c : cases) {
    SCOPED_TRACE(c.n_experts);
    std::vector<std::string> options = c.options;
    options.insert(options.end(), {"--budget", "uniform"});
    const ProgramRun run = run_program(line(output_, options));
    ASSERT_EQ(run.status, 0) << run.err;
    const json report = json::parse(std::ifstream(output_ + ".report.json"));
    for (const json& layer : report["layers"]) {
      EXPECT_EQ(layer["kind"], c.kind);
      EXPECT_EQ(layer["n_experts"], c.n_experts);
      EXPECT_EQ(layer["expert_neurons"], c.neurons);
      EXPECT_EQ(layer["n_shared"], 8);
      // Multiply-adds of neurons, a router of rank 8 and a bypass of rank 8.
      const double used = 3 * 64 * (8 + layer["n_active"].get<double>() * c.neurons) +
                          8 * (64 + c.n_experts) + 2 * 8 * 64;
      EXPECT_NEAR(layer["active_fraction"].get<double>(), used / (3 * 64 * 96), 1e-12);
      EXPECT_LE(layer["active_fraction"].get<double>(), 0.6);
      EXPECT_GT(layer["active_fraction"].get<double>(), 0.5);
      EXPECT_LE(layer["error_distilled"].get<double>(), layer["error_closed_form"].get<double>());
    }
    EXPECT_TRUE(std::filesystem::exists(output_ + ".report.html"));

    const ProgramRun said = run_program({"inspect", output_, "-o", "json", "-p", "the cat"});
    ASSERT_EQ(said.status, 0) << said.err;
    const json inspected = said.json();
    EXPECT_EQ(inspected["layers"][1]["kind"], c.kind);
    EXPECT_EQ(inspected["layers"][1]["n_experts"], c.n_experts);
    EXPECT_EQ(inspected["layers"][1]["expert_neurons"], c.neurons);
    EXPECT_EQ(inspected["experts"]["layers"][1]["counts"].size(),
              static_cast<std::size_t>(c.n_experts));
    EXPECT_NEAR(inspected["active_fraction"].get<double>(), report["active_fraction"].get<double>(),
                1e-9);
    EXPECT_EQ(run_program({"generate", output_, "-p", "the", "-n", "4", "-q"}).status, 0);
    const ProgramRun compared =
        run_program({"compare", model_.path.string(), output_, "--data", text_, "--n-ctx", "64",
                     "--chunks", "2", "-o", "json", "-q"});
    ASSERT_EQ(compared.status, 0) << compared.err;
    EXPECT_NEAR(compared.json()["hybrid"]["active_fraction"].get<double>(),
                report["active_fraction"].get<double>(), 1e-9);
    EXPECT_EQ(run_program({"bench", output_, "-p", "16", "-n", "4", "-r", "1", "-q"}).status, 0);
  }
}

TEST_F(ConvertExperts, DefaultsSpelledOutChangeNothing) {
  const std::string spelled = (folder_.path() / "spelled.gguf").string();
  ASSERT_EQ(run_program(line(output_)).status, 0);
  const ProgramRun run =
      run_program(line(spelled, {"--block", "1", "--experts", "88", "--layers", "0-2"}));
  ASSERT_EQ(run.status, 0) << run.err;
  EXPECT_EQ(bytes(spelled), bytes(output_));
}

TEST_F(ConvertExperts, OnlyTheLayersAskedFor) {
  for (const char* budget : {"planned", "uniform"}) {
    const ProgramRun run =
        run_program(line(output_, {"--layers", "1", "--block", "8", "--budget", budget}));
    ASSERT_EQ(run.status, 0) << run.err;
    const json report = json::parse(std::ifstream(output_ + ".report.json"));
    EXPECT_EQ(report["layers"][0]["kind"], "dense");
    EXPECT_EQ(report["layers"][1]["n_experts"], 11);
    EXPECT_EQ(report["layers"][2]["kind"], "dense");
    EXPECT_NEAR(report["active_fraction"].get<double>(),
                (2 + report["layers"][1]["active_fraction"].get<double>()) / 3, 1e-12);
  }
}

TEST_F(ConvertExperts, CutAndResumedGivesTheSameFile) {
  const std::vector<std::string> options = {"--block", "2", "--experts", "60"};
  const std::string whole = (folder_.path() / "whole.gguf").string();
  const ProgramRun uncut = run_program(line(whole, options));
  ASSERT_EQ(uncut.status, 0) << uncut.err;
  const ProgramRun cut = run_program_and_signal(line(output_, options), "layer  0: ", SIGKILL);
  if (cut.status == 0) GTEST_SKIP() << "the conversion was over before the signal came";
  std::vector<std::string> again = options;
  again.emplace_back("--resume");
  const ProgramRun resumed = run_program(line(output_, again));
  ASSERT_EQ(resumed.status, 0) << resumed.err;
  EXPECT_EQ(bytes(output_), bytes(whole));
}

TEST_F(ConvertExperts, WhatDoesNotFitIsRefused) {
  refused({"--block", "5"}, 1, "--block: 5 given, expected a divisor of 88");
  refused({"--block", "0"}, 2, "--block");
  refused({"--block", "88"}, 1, "--active: a layer at 0.600 has no room for experts");
  refused({"--experts", "87"}, 1, "--experts: 87 given, expected at least 88");
  refused({"--block", "4", "--experts", "21"}, 1, "--experts: 21 given, expected at least 22");
  refused({"--experts", "100000"}, 1, "a router of rank 8 and 100000 experts");
  refused({"--layers", "3"}, 1, "--layers: 3 given, the checkpoint has layers 0 to 2");
  refused({"--plan", "plan.json"}, 1, "--plan: the recipe \"low-rank\" makes no use of a plan");
  refused({"--passes", "2"}, 1, "--passes: the recipe \"low-rank\" makes no use of it");
}

TEST_F(ConvertExperts, OtherRecipesHaveNoBlocks) {
  for (const char* recipe : {"fast", "peer"}) {
    std::vector<std::string> arguments = line(output_, {"--block", "4", "-q"});
    *std::find(arguments.begin(), arguments.end(), "low-rank") = recipe;
    expect_one_line_error(run_program(arguments), 1, "--block: the recipe");
  }
}

// Recovery knows single neurons behind a router alone.
TEST_F(ConvertExperts, RecoveryRefusesBlocks) {
  const ProgramRun run = run_program(line(output_, {"--layers", "1", "--block", "4"}));
  ASSERT_EQ(run.status, 0) << run.err;
  expect_one_line_error(
      run_program({"recover", model_.path.string(), output_, "-o",
                   (folder_.path() / "again.gguf").string(), "--data", text_, "-q"}),
      1, "glu+low_rank+none");
}

}  // namespace
}  // namespace moesaic::tools
