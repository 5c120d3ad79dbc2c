// bench/vs_llama with programs that only pretend to measure.

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdlib>
#include <fstream>
#include <iterator>

#include "tests/tools/program.h"

namespace moesaic::tools {
namespace {

using nlohmann::json;

class VsLlama : public testing::Test {
 protected:
  void SetUp() override {
    if (std::system("command -v python3 > /dev/null") != 0) GTEST_SKIP() << "no python3";
  }

  /// A shell script named like a program.
  void pretend(const std::string& name, const std::string& body) {
    std::filesystem::permissions(folder_.write(name, "#!/bin/sh\n" + body),
                                 std::filesystem::perms::owner_all);
  }

  /// Runs the script with nothing but the folder on PATH.
  ProgramRun run(const std::string& arguments) {
    const std::string out = (folder_.path() / "out").string();
    const std::string err = (folder_.path() / "err").string();
    const int status = std::system(
        ("python=$(python3 -c 'import sys; print(sys.executable)'); PATH=" +
         folder_.path().string() + " \"$python\" " MOESAIC_SOURCE_DIR "/bench/vs_llama " +
         arguments + " > " + out + " 2> " + err)
            .c_str());
    const auto text = [](const std::string& path) {
      std::ifstream file(path);
      return std::string(std::istreambuf_iterator<char>(file), {});
    };
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, text(out), text(err)};
  }

  TemporaryFolder folder_;
};

constexpr const char* kLlamaBench =
    R"(echo '[{"n_prompt":512,"n_gen":0,"avg_ts":100},{"n_prompt":0,"n_gen":128,"avg_ts":50}]')";
// 4 tokens/s more on prompts with each call; 80 tokens/s for sequences decoded together.
constexpr const char* kOurs = R"(case "$*" in
*--sequences*) echo '[{"n_prompt":0,"n_gen":32,"avg_ts":80}]' ;;
*) n=150; while [ -e "$0.$n" ]; do n=$((n + 4)); done; : > "$0.$n"
echo "[{\"n_prompt\":512,\"n_gen\":0,\"avg_ts\":$n},{\"n_prompt\":0,\"n_gen\":128,\"avg_ts\":75}]" ;;
esac)";

TEST_F(VsLlama, WithoutLlamaBenchItSaysThatItSkips) {
  const ProgramRun result = run("model.gguf");
  EXPECT_EQ(result.status, 77);
  EXPECT_NE(result.err.find("skipped: llama-bench"), std::string::npos) << result.err;
  EXPECT_TRUE(result.out.empty());
}

TEST_F(VsLlama, RatiosAreOfPairedRuns) {
  pretend("llama-bench", kLlamaBench);
  pretend("llama-batched-bench", R"(echo '{"pl":16,"speed_tg":160.0}')");
  pretend("ours", kOurs);
  const std::string ours = (folder_.path() / "ours").string();
  const ProgramRun result = run("model.gguf -r 3 -t 2 -o json --moesaic " + ours);
  ASSERT_EQ(result.status, 0) << result.err;
  const json tests = result.json()["files"][0]["tests"];
  ASSERT_EQ(tests.size(), 3U);
  EXPECT_EQ(tests[0]["test"], "pp512");
  EXPECT_EQ(tests[0]["ratios"], (json{1.5, 1.54, 1.58}));
  EXPECT_EQ(tests[0]["ratio"], 1.54);
  EXPECT_EQ(tests[0]["ratio_min"], 1.5);
  EXPECT_EQ(tests[0]["ratio_max"], 1.58);
  EXPECT_EQ(tests[1]["test"], "tg128");
  EXPECT_EQ(tests[1]["ratio"], 1.5);
  EXPECT_EQ(tests[2]["test"], "tg32 x16 @ d16");
  EXPECT_EQ(tests[2]["ratio"], 0.5);
}

TEST_F(VsLlama, WithoutBatchedBenchThatTestIsLeftOut) {
  pretend("llama-bench", kLlamaBench);
  pretend("ours", kOurs);
  const ProgramRun result =
      run("a.gguf b.gguf -r 1 --moesaic " + (folder_.path() / "ours").string());
  ASSERT_EQ(result.status, 0) << result.err;
  EXPECT_NE(result.err.find("llama-batched-bench not found"), std::string::npos) << result.err;
  EXPECT_NE(result.out.find("| b.gguf | tg128 |"), std::string::npos) << result.out;
  EXPECT_EQ(result.out.find("x16"), std::string::npos) << result.out;
}

TEST_F(VsLlama, AFailedRunEndsIt) {
  pretend("llama-bench", "echo 'no such model' >&2; exit 1");
  const ProgramRun result = run("model.gguf -r 1 --sequences 0");
  EXPECT_EQ(result.status, 1);
  EXPECT_NE(result.err.find("no such model"), std::string::npos) << result.err;
}

}  // namespace
}  // namespace moesaic::tools
