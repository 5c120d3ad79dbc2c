// convert: self-routed layers, their plan, and the rival that knows thresholds alone.

#include <gtest/gtest.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <fstream>
#include <limits>

#include "models/self_routed_file.h"
#include "models/transformer.h"
#include "tests/tools/program.h"

namespace moesaic::tools {
namespace {

using models::TinyModel;
using nlohmann::json;

class SelfRouted : public testing::Test {
 protected:
  std::vector<std::string> line(const std::string& output,
                                const std::vector<std::string>& more = {}) const {
    std::vector<std::string> all = {"convert", model_.path, "-o",   output,     "--data",
                                    text_,     "--tokens",  "4096", "--active", "0.6",
                                    "-t",      "2",         "-q"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  std::string path(const std::string& name) const { return (folder_.path() / name).string(); }
  json report(const std::string& output) const {
    return json::parse(std::ifstream(output + ".report.json"));
  }
  json eval(const std::string& model) const {
    const ProgramRun run = run_program({"eval", model, "--data", text_, "--n-ctx", "64", "--chunks",
                                        "4", "--activations", "f32", "-o", "json", "-q"});
    EXPECT_EQ(run.status, 0) << run.err;
    return run.json();
  }

  TinyModel model_{{.n_layers = 3}, [](TinyModel& m) { add_vocabulary(m); }};
  TemporaryFolder folder_;
  std::string text_ = folder_.write("text.txt", words(30000));
  std::string output_ = path("hybrid.gguf");
};

TEST_F(SelfRouted, LeavesHybridPlanAndReports) {
  const ProgramRun run = run_program(line(output_));
  ASSERT_EQ(run.status, 0) << run.err;
  EXPECT_EQ(folder_.entries(), (std::vector<std::string>{"hybrid.gguf", "hybrid.gguf.plan.json",
                                                         "hybrid.gguf.report.html",
                                                         "hybrid.gguf.report.json", "text.txt"}));
  const json found = report(output_);
  EXPECT_NEAR(found["active_fraction"].get<double>(), 0.6, 0.03);
  ASSERT_EQ(found["layers"].size(), 3U);
  const auto hybrid = models::Checkpoint::load(output_);
  EXPECT_NEAR(hybrid->active_fraction(), found["active_fraction"].get<double>(), 0.02);
  // The weights are the dense model's, byte for byte.
  const auto dense = models::Checkpoint::load(model_.path);
  for (const models::GgufTensor& t : dense->file->tensors()) {
    const models::GgufTensor* same = hybrid->file->find_tensor(t.name);
    ASSERT_NE(same, nullptr) << t.name;
    EXPECT_EQ(std::memcmp(same->data, t.data, static_cast<std::size_t>(t.bytes)), 0) << t.name;
  }
  EXPECT_EQ(run_program({"generate", output_, "-p", "the", "-n", "4", "-q"}).status, 0);
  EXPECT_NE(eval(output_)["perplexity"], eval(model_.path.string())["perplexity"]);
}

TEST_F(SelfRouted, SummaryAndReportTellTheShares) {
  const ProgramRun run = run_program(line(output_));
  ASSERT_EQ(run.status, 0) << run.err;
  for (const char* column : {"inputs", "routed", "kept", "predicted KL", "plan.json"}) {
    EXPECT_NE(run.out.find(column), std::string::npos) << run.out;
  }
  EXPECT_EQ(run.out.find("router rank"), std::string::npos) << run.out;
  const auto hybrid = models::Checkpoint::load(output_);
  int n_routed = 0;
  const json of_layers = report(output_)["layers"];
  for (const json& layer : of_layers) {
    if (layer["kind"] != "glu+gate") continue;
    ++n_routed;
    const double shares = layer["input_share"].get<double>() + layer["gate_share"].get<double>() +
                          layer["hidden_share"].get<double>();
    EXPECT_NEAR(shares / 3, layer["active_fraction"].get<double>(), 1e-9);
  }
  EXPECT_GT(n_routed, 0);
  const std::string page = bytes(output_ + ".report.html");
  EXPECT_NE(page.find("fig-usage"), std::string::npos);
  EXPECT_EQ(page.find("usage not recorded"), std::string::npos);
  EXPECT_EQ(page.find("fig-ranks"), std::string::npos);
}

// Shares in the report are those of the file that was written, as inspect finds them.
TEST_F(SelfRouted, ReportAfterRecoveryIsOfWhatWasWritten) {
  const ProgramRun run = run_program(line(output_, {"--recipe", "best", "--recover-tokens", "8192",
                                                    "--judge-every", "2", "--self-tokens", "512"}));
  ASSERT_EQ(run.status, 0) << run.err;
  EXPECT_NE(run.out.find("before recovery"), std::string::npos) << run.out;
  const json found = report(output_);
  const auto hybrid = models::Checkpoint::load(output_);
  EXPECT_NEAR(found["active_fraction"].get<double>(), hybrid->active_fraction(), 1e-4);
  const ProgramRun inspected = run_program({"inspect", output_, "-o", "json", "-q"});
  ASSERT_EQ(inspected.status, 0) << inspected.err;
  const json layers = inspected.json().at("layers");
  for (std::size_t l = 0; l < 3; ++l) {
    EXPECT_NEAR(found["layers"][l]["active_fraction"].get<double>(),
                layers[l]["active_fraction"].get<double>(), 1e-4);
  }
  const std::string page = bytes(output_ + ".report.html");
  EXPECT_NE(page.find("fig-recovery"), std::string::npos);
  EXPECT_NE(page.find("in the hybrid as written"), std::string::npos);
}

TEST_F(SelfRouted, SameSeedSameFile) {
  ASSERT_EQ(run_program(line(output_)).status, 0);
  ASSERT_EQ(run_program(line(path("second.gguf"))).status, 0);
  EXPECT_EQ(bytes(output_), bytes(path("second.gguf")));
}

TEST_F(SelfRouted, FollowsAPlan) {
  ASSERT_EQ(run_program(line(output_)).status, 0);
  const ProgramRun again =
      run_program(line(path("second.gguf"), {"--plan", output_ + ".plan.json"}));
  ASSERT_EQ(again.status, 0) << again.err;
  EXPECT_EQ(bytes(output_), bytes(path("second.gguf")));
}

TEST_F(SelfRouted, PlansAgainFromMeasuredCurves) {
  ASSERT_EQ(run_program(line(output_)).status, 0);
  auto other = line(path("second.gguf"), {"--curves", output_ + ".plan.json"});
  *std::find(other.begin(), other.end(), "0.6") = "0.4";
  ASSERT_EQ(run_program(other).status, 0);
  EXPECT_NEAR(report(path("second.gguf"))["active_fraction"].get<double>(), 0.4, 0.03);
  auto uniform =
      line(path("third.gguf"), {"--curves", output_ + ".plan.json", "--budget", "uniform"});
  ASSERT_EQ(run_program(uniform).status, 0);
  const json of_layers = report(path("third.gguf"))["layers"];
  for (const json& layer : of_layers) {
    EXPECT_NEAR(layer["active_fraction"].get<double>(), 0.6, 0.03);
  }
}

TEST_F(SelfRouted, AllActiveIsTheDenseModel) {
  auto all = line(output_);
  *std::find(all.begin(), all.end(), "0.6") = "1";
  ASSERT_EQ(run_program(all).status, 0);
  EXPECT_EQ(report(output_)["active_fraction"], 1.0);
  EXPECT_EQ(eval(output_)["perplexity"], eval(model_.path.string())["perplexity"]);
}

TEST_F(SelfRouted, ThresholdRecipeIsTheSameShareEverywhere) {
  const ProgramRun run = run_program(line(output_, {"--recipe", "threshold"}));
  ASSERT_EQ(run.status, 0) << run.err;
  const json of_layers = report(output_)["layers"];
  for (const json& layer : of_layers) {
    EXPECT_EQ(layer["kind"], "glu+input");
    EXPECT_NEAR(layer["active_fraction"].get<double>(), 0.6, 0.03);
  }
  expect_one_line_error(
      run_program(line(path("x.gguf"), {"--recipe", "threshold", "--plan", text_})), 1,
      "makes no use of a plan");
}

TEST_F(SelfRouted, PlansThatDoNotFit) {
  expect_one_line_error(run_program(line(output_, {"--plan", text_})), 1, "text.txt: is no plan");
  expect_one_line_error(run_program(line(output_, {"--plan", path("none.json")})), 1,
                        "none.json: cannot open");
  const std::string shorter =
      folder_.write("short.json", R"({"moesaic_plan": 1, "kind": "glu+gate", "layers": []})");
  expect_one_line_error(run_program(line(output_, {"--plan", shorter})), 1,
                        "plans 0 layers, expected 3");
}

TEST_F(SelfRouted, FractionThatNoPlanReaches) {
  auto little = line(output_);
  *std::find(little.begin(), little.end(), "0.6") = "0.02";
  expect_one_line_error(run_program(little), 1, "--active: 0.020 given, the least");
}

TEST_F(SelfRouted, NanInTheCheckpoint) {
  for (const char* tensor : {"token_embd.weight", "blk.1.attn_q.weight", "blk.1.ffn_up.weight"}) {
    const TinyModel damaged({.n_layers = 3}, [&](TinyModel& m) {
      add_vocabulary(m);
      const float nan = std::numeric_limits<float>::quiet_NaN();
      std::memcpy(m.tensor(tensor).data.data(), &nan, sizeof(nan));
    });
    std::vector<std::string> arguments = line(output_);
    arguments[1] = damaged.path.string();
    expect_one_line_error(run_program(arguments), 1, damaged.path.filename().string());
    EXPECT_FALSE(std::filesystem::exists(output_)) << tensor;
    std::filesystem::remove_all(output_ + ".state");
  }
}

}  // namespace
}  // namespace moesaic::tools
