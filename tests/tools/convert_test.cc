// convert: what the program adds to the converter's own checks.

#include <gtest/gtest.h>

#include <csignal>
#include <fstream>

#include "tests/tools/program.h"

namespace moesaic::tools {
namespace {

using models::TinyModel;
using nlohmann::json;

class Convert : public testing::Test {
 protected:
  std::vector<std::string> line(const std::string& output) const {
    return {"convert",  model_.path, "-o",       output, "--data", text_,
            "--tokens", "4096",      "--active", "0.6",  "-t",     "2"};
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

TEST_F(Convert, InterruptedThenResumedGivesTheSameFile) {
  ASSERT_EQ(run_program(line(output_)).status, 0);
  const std::string second = (folder_.path() / "second.gguf").string();
  const ProgramRun cut = run_program_and_signal(line(second), "layer  0: ", SIGTERM);
  if (cut.status == 0) GTEST_SKIP() << "the conversion was over before the signal came";
  EXPECT_EQ(cut.status, 1);
  EXPECT_NE(cut.err.find("moesaic: error: interrupted"), std::string::npos) << cut.err;
  EXPECT_FALSE(std::filesystem::exists(second));
  std::vector<std::string> again = line(second);
  again.emplace_back("--resume");
  const ProgramRun resumed = run_program(again);
  ASSERT_EQ(resumed.status, 0) << resumed.err;
  const auto bytes = [](const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  EXPECT_EQ(bytes(second), bytes(output_));
}

}  // namespace
}  // namespace moesaic::tools
