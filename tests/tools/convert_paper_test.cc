// convert --recipe paper, peer, sgatlin: students from a random start, in a file that runs.

#include <gtest/gtest.h>

#include <csignal>
#include <fstream>

#include "tests/tools/program.h"

namespace moesaic::tools {
namespace {

using models::TinyModel;
using nlohmann::json;

class ConvertPaper : public testing::Test {
 protected:
  std::vector<std::string> line(const std::string& output, const std::string& recipe,
                                std::vector<std::string> more = {}) const {
    std::vector<std::string> all = {"convert", model_.path, "-o",       output,     "--data",
                                    text_,     "--tokens",  "4096",     "--active", "0.6",
                                    "-t",      "2",         "--recipe", recipe};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }

  TinyModel model_{{.n_layers = 3}, [](TinyModel& m) { add_vocabulary(m); }};
  TemporaryFolder folder_;
  std::string text_ = folder_.write("text.txt", words(30000));
  std::string output_ = (folder_.path() / "hybrid.gguf").string();
};

TEST_F(ConvertPaper, EveryRecipeMakesAFileThatRuns) {
  const std::pair<const char*, const char*> recipes[] = {{"paper", "gelu+low_rank+softmax"},
                                                         {"peer", "gelu+product_key+softmax"},
                                                         {"sgatlin", "linear+product_key+score"}};
  for (const auto& [recipe, kind] : recipes) {
    SCOPED_TRACE(recipe);
    const ProgramRun run = run_program(line(output_, recipe, {"--passes", "2"}));
    ASSERT_EQ(run.status, 0) << run.err;
    const json report = json::parse(std::ifstream(output_ + ".report.json"));
    ASSERT_EQ(report["layers"].size(), 3U);
    for (const json& layer : report["layers"]) {
      EXPECT_EQ(layer["kind"], kind);
      EXPECT_EQ(layer["n_experts"], 196);  // the first square from 2 · 96 on
      EXPECT_EQ(layer["n_shared"], layer["n_active"]);
      EXPECT_TRUE(layer["error_closed_form"].is_null());
      EXPECT_TRUE(layer["error_distilled"].is_number());
      EXPECT_LE(layer["active_fraction"].get<double>(), 0.6);
      EXPECT_GT(layer["active_fraction"].get<double>(), 0.55);
    }
    EXPECT_TRUE(std::filesystem::exists(output_ + ".report.html"));
    EXPECT_FALSE(std::filesystem::exists(output_ + ".plan.json"));

    const ProgramRun said = run_program({"inspect", output_, "-o", "json"});
    ASSERT_EQ(said.status, 0) << said.err;
    EXPECT_EQ(said.json()["layers"][1]["kind"], kind);
    EXPECT_EQ(said.json()["layers"][1]["n_experts"], 196);
    EXPECT_NEAR(said.json()["active_fraction"].get<double>(),
                report["active_fraction"].get<double>(), 1e-9);
    EXPECT_EQ(run_program({"generate", output_, "-p", "the", "-n", "4", "-q"}).status, 0);
    const ProgramRun compared =
        run_program({"compare", model_.path.string(), output_, "--data", text_, "--n-ctx", "64",
                     "--chunks", "2", "-o", "json", "-q"});
    ASSERT_EQ(compared.status, 0) << compared.err;
    EXPECT_NEAR(compared.json()["hybrid"]["active_fraction"].get<double>(),
                report["active_fraction"].get<double>(), 1e-9);
  }
}

TEST_F(ConvertPaper, OnlyTheLayersAskedFor) {
  const ProgramRun run =
      run_program(line(output_, "peer", {"--layers", "0,2-2", "--experts", "100"}));
  ASSERT_EQ(run.status, 0) << run.err;
  const json layers = json::parse(std::ifstream(output_ + ".report.json"))["layers"];
  EXPECT_EQ(layers[0]["kind"], "gelu+product_key+softmax");
  EXPECT_EQ(layers[0]["n_experts"], 100);
  EXPECT_EQ(layers[1]["kind"], "dense");
  EXPECT_EQ(layers[1]["active_fraction"], 1.0);
  EXPECT_EQ(layers[2]["kind"], "gelu+product_key+softmax");
}

TEST_F(ConvertPaper, CutAndResumedGivesTheSameFile) {
  const std::string whole = (folder_.path() / "whole.gguf").string();
  const ProgramRun uncut = run_program(line(whole, "sgatlin"));
  ASSERT_EQ(uncut.status, 0) << uncut.err;
  const ProgramRun cut = run_program_and_signal(line(output_, "sgatlin"), "layer  0: ", SIGKILL);
  if (cut.status == 0) GTEST_SKIP() << "the conversion was over before the signal came";
  EXPECT_FALSE(std::filesystem::exists(output_));
  const ProgramRun resumed = run_program(line(output_, "sgatlin", {"--resume"}));
  ASSERT_EQ(resumed.status, 0) << resumed.err;
  EXPECT_EQ(bytes(output_), bytes(whole));
}

// All of it before the work, not after it.
TEST_F(ConvertPaper, WhatDoesNotFitIsRefused) {
  const auto refused = [&](const std::string& recipe, std::vector<std::string> more, int status,
                           const char* says) {
    more.emplace_back("-q");
    expect_one_line_error(run_program(line(output_, recipe, more)), status, says);
    EXPECT_FALSE(std::filesystem::exists(output_ + ".state"));
  };
  refused("peer", {"--experts", "90"}, 1, "expected a square");
  refused("peer", {"--layers", "3"}, 1, "--layers: 3 given, the checkpoint has layers 0 to 2");
  refused("peer", {"--layers", "2-1"}, 2, "--layers");
  refused("peer", {"--layers", "x"}, 2, "--layers");
  refused("paper", {"--experts", "100000"}, 1, "does not pay for the router of 100000 experts");
  refused("fast", {"--layers", "1"}, 1, "--layers");
  refused("best", {"--experts", "100"}, 1, "--experts: the recipe \"best\" makes no use of it");
  refused("sgatlin", {"--plan", "plan.json"}, 1, "--plan");
  refused("sgatlin", {"--expert-type", "Q4_K"}, 1, "--expert-type: Q4_K cannot hold rows of 64");
}

TEST_F(ConvertPaper, RecoveryIsRefused) {
  const ProgramRun run = run_program(line(output_, "sgatlin", {"--layers", "1"}));
  ASSERT_EQ(run.status, 0) << run.err;
  expect_one_line_error(
      run_program({"recover", model_.path.string(), output_, "-o",
                   (folder_.path() / "again.gguf").string(), "--data", text_, "-q"}),
      1, "linear+product_key+score");
}

}  // namespace
}  // namespace moesaic::tools
