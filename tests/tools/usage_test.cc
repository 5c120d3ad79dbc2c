// What every subcommand shares: exit statuses, error lines, help, standard output that fails.

#include <gtest/gtest.h>

#include "tests/tools/program.h"

namespace moesaic::tools {
namespace {

using models::TinyModel;

const std::vector<std::string> kCommands = {"convert", "compare",  "eval",  "generate", "bench",
                                            "inspect", "tokenize", "score", "report",   "study"};

TEST(Usage, HelpHasExamples) {
  for (const std::string& command : kCommands) {
    const ProgramRun run = run_program({command, "--help"});
    EXPECT_EQ(run.status, 0) << command;
    EXPECT_EQ(run.err, "") << command;
    EXPECT_NE(run.out.find("Example"), std::string::npos) << command;
    EXPECT_NE(run.out.find("moesaic " + command), std::string::npos) << command;
  }
}

TEST(Usage, TopHelpListsEverySubcommand) {
  const ProgramRun run = run_program({"--help"});
  EXPECT_EQ(run.status, 0);
  for (const std::string& command : kCommands) {
    EXPECT_NE(run.out.find("  " + command), std::string::npos) << command;
  }
}

TEST(Usage, NoSubcommand) { expect_one_line_error(run_program({}), 2, "subcommand"); }

TEST(Usage, UnknownSubcommand) { expect_one_line_error(run_program({"fly"}), 2, "fly"); }

TEST(Usage, UnknownFlag) {
  for (const std::string& command : kCommands) {
    expect_one_line_error(run_program({command, "model.gguf", "--wings"}), 2, "");
  }
}

TEST(Usage, MissingRequired) {
  expect_one_line_error(run_program({"eval", "model.gguf"}), 2, "--data");
  expect_one_line_error(run_program({"convert", "model.gguf"}), 2, "--output");
  expect_one_line_error(run_program({"score", "model.gguf"}), 2, "--ids");
  expect_one_line_error(run_program({"generate", "model.gguf"}), 2, "--prompt");
  expect_one_line_error(run_program({"tokenize", "model.gguf"}), 2, "--prompt");
  expect_one_line_error(run_program({"bench"}), 2, "MODEL");
}

TEST(Usage, ValuesOutOfRange) {
  const std::vector<std::vector<std::string>> lines = {
      {"bench", "m.gguf", "-t", "0"},
      {"bench", "m.gguf", "-t", "two"},
      {"bench", "m.gguf", "-r", "0"},
      {"bench", "m.gguf", "-p", "512,-3"},
      {"bench", "m.gguf", "-p", "0", "-n", "0"},
      {"bench", "m.gguf", "-o", "xml"},
      {"bench", "m.gguf", "--activations", "int8"},
      {"eval", "m.gguf", "--data", "x", "--chunks", "0"},
      {"eval", "m.gguf", "--data", "x", "--n-ctx", "3"},
      {"generate", "m.gguf", "-p", "x", "--temp", "-1"},
      {"generate", "m.gguf", "-p", "x", "--temp", "nan"},
      {"generate", "m.gguf", "-p", "x", "--top-p", "1.5"},
      {"generate", "m.gguf", "-p", "x", "--min-p", "inf"},
      {"generate", "m.gguf", "-p", "x", "-n", "-2"},
      {"generate", "m.gguf", "-p", "x", "--seed", "-1"},
      {"generate", "m.gguf", "-p", "x", "--batch", "y"},
      {"convert", "m.gguf", "-o", "h.gguf", "--active", "0"},
      {"convert", "m.gguf", "-o", "h.gguf", "--active", "1.01"},
      {"convert", "m.gguf", "-o", "h.gguf", "--expert-type", "Q9_9"},
      {"convert", "m.gguf", "-o", "h.gguf", "--recipe", "slow"},
      {"score", "m.gguf", "--ids", "x", "--top", "-1"},
      {"report", "folder", "-o", "page.pdf"},
      {"inspect", "m.gguf", "-p", "x", "--top-tokens", "0"},
  };
  for (const auto& line : lines) {
    SCOPED_TRACE(line[0] + " " + line[line.size() - 2] + " " + line.back());
    expect_one_line_error(run_program(line), 2, "");
  }
}

TEST(Usage, DevicesThatAreNotThere) {
  expect_one_line_error(run_program({"inspect", "m.gguf", "-p", "x", "--device", "cuda:0"}), 2,
                        "cuda:0");
  expect_one_line_error(run_program({"generate", "m.gguf", "-p", "x", "--device", "cuda:x"}), 2,
                        "cuda:x");
  // No machine has so many GPUs; without CUDA in the program it is the usage that is wrong.
  const TinyModel model({}, [](TinyModel& m) { add_vocabulary(m); });
  const ProgramRun run =
      run_program({"generate", model.path.string(), "-p", "x", "--device", "cuda:99", "-q"});
  EXPECT_TRUE(run.status == 1 || run.status == 2) << run.status;
  expect_one_line_error(run, run.status, "");
  EXPECT_TRUE(run.err.find("CUDA") != std::string::npos ||
              run.err.find("cuda") != std::string::npos)
      << run.err;
  expect_one_line_error(run_program({"bench", "m.gguf", "--device", "tpu"}), 2, "expected cpu");
}

TEST(Usage, MissingModelFile) {
  expect_one_line_error(run_program({"inspect", "/nowhere/m.gguf"}), 1, "/nowhere/m.gguf");
}

TEST(Usage, TruncatedModel) {
  const TinyModel model({}, [](TinyModel& m) { add_vocabulary(m); });
  const TemporaryFolder folder;
  const auto copy = folder.path() / "cut.gguf";
  std::filesystem::copy_file(model.path, copy);
  std::filesystem::resize_file(copy, std::filesystem::file_size(copy) / 2);
  expect_one_line_error(run_program({"inspect", copy.string()}), 1, "cut.gguf");
}

TEST(Usage, FullDiskBehindStandardOutput) {
  const TinyModel model({}, [](TinyModel& m) { add_vocabulary(m); });
  for (const std::vector<std::string>& line :
       {std::vector<std::string>{"inspect", model.path},
        std::vector<std::string>{"tokenize", model.path, "-p", "the river"},
        std::vector<std::string>{"generate", model.path, "-p", "the", "-q"}}) {
    expect_one_line_error(run_program_to("/dev/full", line), 1, "No space left");
  }
}

TEST(Usage, StandardOutputClosed) {
  const TinyModel model({}, [](TinyModel& m) { add_vocabulary(m); });
  expect_one_line_error(run_program_to_closed_pipe({"inspect", model.path}), 1, "Broken pipe");
  expect_one_line_error(run_program_to_closed_pipe({"generate", model.path, "-p", "the", "-q"}), 1,
                        "Broken pipe");
}

}  // namespace
}  // namespace moesaic::tools
