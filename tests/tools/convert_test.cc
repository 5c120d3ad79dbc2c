// convert --recipe low-rank: what the program adds to the converter's own checks.

#include "converter/convert.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <fstream>
#include <limits>
#include <ostream>

#include "tests/tools/program.h"

namespace moesaic::tools {
namespace {

using models::TinyModel;
using models::TinyOptions;
using nlohmann::json;

class Convert : public testing::Test {
 protected:
  std::vector<std::string> line(const std::string& output) const {
    return {"convert", model_.path, "-o",  output, "--data", text_,      "--tokens",
            "4096",    "--active",  "0.6", "-t",   "2",      "--recipe", "low-rank"};
  }

  TinyModel model_{{.n_layers = 3}, [](TinyModel& m) { add_vocabulary(m); }};
  TemporaryFolder folder_;
  std::string text_ = folder_.write("text.txt", words(30000));
  std::string output_ = (folder_.path() / "hybrid.gguf").string();
};

TEST_F(Convert, LeavesHybridAndReports) {
  const ProgramRun run = run_program(line(output_));
  ASSERT_EQ(run.status, 0) << run.err;
  const json report = json::parse(std::ifstream(output_ + ".report.json"));
  for (const char* key : {"seconds", "peak_memory_bytes", "active_fraction", "layers"}) {
    EXPECT_TRUE(report.contains(key)) << key;
  }
  ASSERT_EQ(report["layers"].size(), 3U);
  for (const char* key : {"layer", "kind", "n_shared", "n_experts", "n_active", "router_rank",
                          "bypass_rank", "error_closed_form", "error_distilled"}) {
    EXPECT_TRUE(report["layers"][0].contains(key)) << key;
  }
  EXPECT_LE(report["active_fraction"].get<double>(), 0.6);
  EXPECT_EQ(folder_.entries(), (std::vector<std::string>{"hybrid.gguf", "hybrid.gguf.report.html",
                                                         "hybrid.gguf.report.json", "text.txt"}));
  EXPECT_EQ(run_program({"generate", output_, "-p", "the", "-n", "4", "-q"}).status, 0);
}

TEST_F(Convert, RefusesToOverwriteItsInput) {
  expect_one_line_error(run_program(line(model_.path.string())), 2, "is the checkpoint to convert");
  const auto alias = folder_.path() / "alias.gguf";
  std::filesystem::create_symlink(model_.path, alias);
  expect_one_line_error(run_program(line(alias.string())), 2, "is the checkpoint to convert");
}

TEST_F(Convert, OutputThatCannotBeWritten) {
  std::vector<std::string> quiet = line("/nowhere/hybrid.gguf");
  quiet.emplace_back("-q");
  expect_one_line_error(run_program(quiet), 1, "/nowhere");
}

// Any option that the plan cannot follow is refused at once, not after the work.
TEST_F(Convert, FractionWithoutRoomForExperts) {
  std::vector<std::string> arguments = line(output_);
  *std::find(arguments.begin(), arguments.end(), "0.6") = "0.05";
  arguments.emplace_back("-q");
  expect_one_line_error(run_program(arguments), 1, "--active");
  EXPECT_FALSE(std::filesystem::exists(output_ + ".state"));
}

TEST_F(Convert, PlanThatIsNoneIsNamed) {
  const ProgramRun cut = run_program_and_signal(line(output_), "layer  0: ", SIGTERM);
  if (cut.status == 0) GTEST_SKIP() << "the conversion was over before the signal came";
  std::ofstream(output_ + ".state/plan.json") << "[]";
  std::vector<std::string> again = line(output_);
  again.insert(again.end(), {"--resume", "-q"});
  expect_one_line_error(run_program(again), 1, "plan.json: plans 0 layers, expected 3");
}

TEST_F(Convert, NanInTheCheckpoint) {
  for (const char* tensor : {"token_embd.weight", "blk.1.attn_q.weight", "blk.1.ffn_up.weight"}) {
    const TinyModel damaged({.n_layers = 3}, [&](TinyModel& m) {
      add_vocabulary(m);
      const float nan = std::numeric_limits<float>::quiet_NaN();
      std::memcpy(m.tensor(tensor).data.data(), &nan, sizeof(nan));
    });
    std::vector<std::string> arguments = line(output_);
    arguments[1] = damaged.path.string();
    arguments.emplace_back("-q");
    expect_one_line_error(run_program(arguments), 1, damaged.path.filename().string());
    EXPECT_FALSE(std::filesystem::exists(output_)) << tensor;
    std::filesystem::remove_all(output_ + ".state");
    expect_one_line_error(run_program({"eval", damaged.path.string(), "--data", text_, "--n-ctx",
                                       "64", "--chunks", "2", "-q"}),
                          1, "NaN");
  }
}

// Shares of the whole job never go back and end at one.
TEST_F(Convert, JobSharesRiseToOne) {
  struct Recorder : engine::Monitor {
    void job(double from, double to) override {
      EXPECT_GE(from, last - 1e-9);
      EXPECT_GE(to, from);
      last = to;
    }
    double last = 0;
  } recorder;
  ThreadPool pool(2);
  Workspace workspace;
  Tally tally;
  Context ctx{pool, workspace, tally, Activations::F32};
  converter::ConvertOptions options;
  options.model = model_.path;
  options.output = output_;
  options.data = text_;
  options.active = 0.6;
  options.tokens = 4096;
  options.recipe = "low-rank";
  converter::convert(options, ctx, recorder);
  EXPECT_NEAR(recorder.last, 1, 1e-9);
}

struct Cut {
  const char* name;
  TinyOptions model;
  bool self;         // calibrates on its own text
  const char* when;  // what the program says when the signal comes
  int signal;
};

void PrintTo(const Cut& cut, std::ostream* out) { *out << cut.name; }

class ConvertCut : public testing::TestWithParam<Cut> {};

TEST_P(ConvertCut, ThenResumedGivesTheSameFile) {
  const TinyModel model(GetParam().model, [](TinyModel& m) { add_vocabulary(m); });
  const TemporaryFolder folder;
  const std::string text = GetParam().self ? "self" : folder.write("text.txt", words(30000));
  const auto line = [&](const std::string& output) {
    return std::vector<std::string>{"convert",  model.path, "-o",       output,    "--data",
                                    text,       "--tokens", "4096",     "-t",      "2",
                                    "--active", "0.6",      "--recipe", "low-rank"};
  };
  const std::string whole = (folder.path() / "whole.gguf").string();
  const std::string second = (folder.path() / "second.gguf").string();
  const ProgramRun uncut = run_program(line(whole));
  ASSERT_EQ(uncut.status, 0) << uncut.err;
  const ProgramRun cut = run_program_and_signal(line(second), GetParam().when, GetParam().signal);
  if (cut.status == 0) GTEST_SKIP() << "the conversion was over before the signal came";
  EXPECT_FALSE(std::filesystem::exists(second));
  if (GetParam().signal == SIGKILL) {
    EXPECT_EQ(cut.status, 128 + SIGKILL);
  } else {
    EXPECT_EQ(cut.status, 1);
    EXPECT_NE(cut.err.find("moesaic: error: interrupted"), std::string::npos) << cut.err;
  }
  std::vector<std::string> again = line(second);
  again.emplace_back("--resume");
  const ProgramRun resumed = run_program(again);
  ASSERT_EQ(resumed.status, 0) << resumed.err;
  const auto bytes = [](const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  EXPECT_EQ(bytes(second), bytes(whole));
  const ProgramRun said = run_program({"generate", second, "-p", "the", "-n", "4", "-q"});
  EXPECT_EQ(said.status, 0) << said.err;
}

INSTANTIATE_TEST_SUITE_P(
    Cases, ConvertCut,
    testing::Values(Cut{"LlamaAfterThePlan", {.n_layers = 3}, false, "plan: ", SIGTERM},
                    Cut{"LlamaAfterALayer", {.n_layers = 3}, false, "layer  0: ", SIGTERM},
                    Cut{"LlamaQuantisedKilled",
                        {.n_layers = 3, .dtype = DType::Q4_1},
                        false,
                        "layer  1: ",
                        SIGKILL},
                    Cut{"LlamaOnItsOwnText", {.n_layers = 3}, true, "layer  0: ", SIGINT},
                    Cut{"Gemma",
                        {.architecture = "gemma3", .n_layers = 3, .window = 16},
                        false,
                        "layer  0: ",
                        SIGKILL}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace moesaic::tools
