// generate: one prompt, and JSONL files.

#include <gtest/gtest.h>

#include <csignal>
#include <sstream>

#include "tests/tools/program.h"

namespace moesaic::tools {
namespace {

using models::TinyModel;
using nlohmann::json;

class Generate : public testing::Test {
 protected:
  ProgramRun batch(const std::string& lines, std::vector<std::string> more = {}) {
    std::vector<std::string> arguments = {"generate", path_, "--batch",
                                          folder_.write("batch.jsonl", lines), "-q"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return run_program(arguments);
  }
  static std::vector<json> parse_lines(const std::string& text) {
    std::vector<json> out;
    std::istringstream stream(text);
    for (std::string line; std::getline(stream, line);) out.push_back(json::parse(line));
    return out;
  }

  TinyModel model_{{}, [](TinyModel& m) { add_vocabulary(m); }};
  TemporaryFolder folder_;
  std::string path_ = model_.path.string();
};

TEST_F(Generate, StreamsWhatJsonReports) {
  const std::vector<std::string> line = {"generate", path_,    "-p", "the river", "-n",
                                         "12",       "--temp", "0",  "-q"};
  const ProgramRun text = run_program(line);
  std::vector<std::string> as_json = line;
  as_json.insert(as_json.end(), {"-o", "json"});
  const ProgramRun run = run_program(as_json);
  ASSERT_EQ(text.status, 0) << text.err;
  ASSERT_EQ(run.status, 0) << run.err;
  const json result = run.json();
  EXPECT_EQ(text.out, result["text"].get<std::string>() + "\n");
  EXPECT_EQ(result["prompt"], "the river");
  EXPECT_EQ(result["prompt_tokens"], 8);
  EXPECT_EQ(result["completion_tokens"], result["tokens"].size());
}

TEST_F(Generate, SameSeedSameText) {
  const auto text = [&](const char* seed) {
    return run_program({"generate", path_, "-p", "north", "--seed", seed, "-n", "24", "-q",
                        "--ignore-eos", "--temp", "50", "--top-k", "0", "--top-p", "1", "--min-p",
                        "0"})
        .out;
  };
  EXPECT_EQ(text("7"), text("7"));
  EXPECT_NE(text("7"), text("8"));
}

TEST_F(Generate, EmptyPromptNeedsABos) {
  EXPECT_EQ(run_program({"generate", path_, "-p", "", "-n", "3", "-q"}).status, 0);
  const TinyModel without({}, [](TinyModel& m) { add_vocabulary(m, false); });
  expect_one_line_error(run_program({"generate", without.path, "-p", "", "-n", "3", "-q"}), 1,
                        "empty prompt");
}

TEST_F(Generate, SpecialTokensInAPromptAreTextUnlessAsked) {
  const auto prompt_tokens = [&](std::vector<std::string> more) {
    std::vector<std::string> line = {"generate", path_, "-p", "<|im_end|>", "-n",
                                     "1",        "-q",  "-o", "json"};
    line.insert(line.end(), more.begin(), more.end());
    return run_program(line).json()["prompt_tokens"].get<int>();
  };
  EXPECT_EQ(prompt_tokens({"--special"}), 1);
  EXPECT_GT(prompt_tokens({}), 5);
}

TEST_F(Generate, BatchKeepsOrderAndPerLineOptions) {
  const ProgramRun run = batch(
      R"({"id": "first", "prompt": "the river", "max_tokens": 9, "temperature": 0}
{"prompt": "north", "max_tokens": 2, "seed": 5, "top_k": 3, "top_p": 0.9, "min_p": 0, "repeat_penalty": 1.1}

{"id": 3, "messages": [{"role": "user", "content": "hills"}], "max_tokens": 4, "stop": ["zz", "qq"]}
)",
      {"--parallel", "2", "--ignore-eos"});
  ASSERT_EQ(run.status, 0) << run.err;
  const std::vector<json> results = parse_lines(run.out);
  ASSERT_EQ(results.size(), 3U);
  EXPECT_EQ(results[0]["id"], "first");
  EXPECT_EQ(results[0]["completion_tokens"], 9);
  EXPECT_EQ(results[0]["finish_reason"], "length");
  EXPECT_FALSE(results[1].contains("id"));
  EXPECT_EQ(results[1]["completion_tokens"], 2);
  EXPECT_EQ(results[2]["id"], 3);
  EXPECT_EQ(results[2]["messages"][0]["content"], "hills");
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(results[i]["index"], i);
    for (const char* key :
         {"text", "tokens", "finish_reason", "prompt_tokens", "completion_tokens"}) {
      EXPECT_TRUE(results[i].contains(key)) << key;
    }
  }
  // A line alone gives what it gives among others.
  const json alone = run_program({"generate", path_, "-p", "the river", "-n", "9", "--temp", "0",
                                  "-q", "-o", "json", "--ignore-eos"})
                         .json();
  EXPECT_EQ(alone["tokens"], results[0]["tokens"]);
}

TEST_F(Generate, BracketsInAStopStringAreText) {
  EXPECT_EQ(run_program({"generate", path_, "-p", "the", "-n", "2", "--stop", "[end]", "--stop",
                         "a,b", "-q"})
                .status,
            0);
}

TEST_F(Generate, MalformedLinesAreNamedBeforeAnyWork) {
  const auto second = [&](const std::string& line) {
    return batch("{\"prompt\": \"the\"}\n" + line + "\n");
  };
  expect_one_line_error(second("{\"prompt\": "), 1, "batch.jsonl:2: not JSON");
  expect_one_line_error(second("[1]"), 1, "batch.jsonl:2: found array, expected an object");
  expect_one_line_error(second("{\"prompt\": \"a\", \"wings\": 2}"), 1, "unknown key 'wings'");
  expect_one_line_error(second("{\"prompt\": 3}"), 1, "prompt: found 3, expected a string");
  expect_one_line_error(second("{\"max_tokens\": 3}"), 1, "found neither prompt and messages");
  expect_one_line_error(second("{\"prompt\": \"a\", \"messages\": []}"), 1, "messages: found []");
  expect_one_line_error(second("{\"prompt\": \"a\", \"max_tokens\": 1.5}"), 1, "max_tokens");
  expect_one_line_error(second("{\"prompt\": \"a\", \"temperature\": -1}"), 1, "temperature");
  expect_one_line_error(second("{\"prompt\": \"a\", \"seed\": 99999999999999999999}"), 1, "seed");
  expect_one_line_error(second("{\"prompt\": \"a\", \"stop\": [1]}"), 1, "stop");
  expect_one_line_error(second("{\"messages\": [{\"role\": \"user\"}]}"), 1, "role and content");
  expect_one_line_error(second("{\"prompt\": \"\xff\"}"), 1, "batch.jsonl:2");
  expect_one_line_error(second("{\"prompt\": \"" + std::string(300, 'z') + "\"}"), 1,
                        "batch.jsonl:2: prompt of 300 tokens, the model's context is 256");
  expect_one_line_error(batch("\n"), 1, "empty");
}

TEST_F(Generate, InterruptMarksWhatIsUnfinished) {
  std::string lines;
  for (int i = 0; i < 3000; ++i) lines += "{\"prompt\": \"the river\", \"max_tokens\": 200}\n";
  const std::string file = folder_.write("long.jsonl", lines);
  // A signal as soon as the log shows that work has begun; nothing there within the first seconds
  // would end the test by its time limit.
  const ProgramRun run = run_program_and_signal(
      {"generate", path_, "--batch", file, "--ignore-eos", "--parallel", "4"}, " %", SIGINT);
  EXPECT_EQ(run.status, 1);
  EXPECT_NE(run.err.find("moesaic: error: interrupted: "), std::string::npos) << run.err;
  const std::vector<json> results = parse_lines(run.out);
  ASSERT_EQ(results.size(), 3000U);
  EXPECT_EQ(results.back()["finish_reason"], "cancelled");
}

}  // namespace
}  // namespace moesaic::tools
