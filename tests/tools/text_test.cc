// tokenize, score, eval: ids and figures of a text.

#include <gtest/gtest.h>

#include <cmath>

#include "models/evaluate.h"
#include "tests/tools/program.h"

namespace moesaic::tools {
namespace {

using models::TinyModel;
using nlohmann::json;

class Text : public testing::Test {
 protected:
  TinyModel model_{{}, [](TinyModel& m) { add_vocabulary(m); }};
  TemporaryFolder folder_;
  std::string path_ = model_.path.string();
};

// a is 3, z is 28, 0 is 29, space 39, newline 40, "th" 48.
TEST_F(Text, TokenizeParsesSpecials) {
  const ProgramRun run = run_program({"tokenize", path_, "-p", "<|im_start|>the\n"});
  EXPECT_EQ(run.status, 0) << run.err;
  EXPECT_EQ(run.json(), json({1, 48, 7, 40}));
}

TEST_F(Text, TokenizeU32IsLittleEndian) {
  const std::string file = folder_.write("t.txt", "a z");
  const ProgramRun run = run_program({"tokenize", path_, "--file", file, "-o", "u32"});
  EXPECT_EQ(run.status, 0) << run.err;
  EXPECT_EQ(run.out, std::string("\x03\0\0\0\x27\0\0\0\x1c\0\0\0", 12));
}

TEST_F(Text, TokenizeEmptyTextGivesNothing) {
  EXPECT_EQ(run_program({"tokenize", path_, "-p", ""}).json(), json::array());
}

TEST_F(Text, TokenizeRefusesWhatIsNotUtf8) {
  const std::string file = folder_.write("bad.txt", "ab\xff");
  expect_one_line_error(run_program({"tokenize", path_, "--file", file}), 1, "bad.txt");
  expect_one_line_error(run_program({"eval", path_, "--data", file, "-q"}), 1, "byte 2");
}

TEST_F(Text, ScoreEqualsTheLibrary) {
  const std::vector<std::int32_t> ids = models::random_ids(40);
  const std::string file = folder_.write("ids.json", json({{"input_ids", ids}}).dump());
  const ProgramRun run =
      run_program({"score", path_, "--ids", file, "--top", "3", "-o", "json", "-t", "2", "-q"});
  ASSERT_EQ(run.status, 0) << run.err;
  const json result = run.json();
  EXPECT_EQ(result["ids"], json(ids));

  models::TestContext context;
  models::Transformer transformer(model_.load(), context.context);
  engine::Monitor monitor;
  const models::TokenScores expected = models::score_tokens(transformer, ids, 3, monitor);
  ASSERT_EQ(result["nll"].size(), ids.size() - 1);
  for (std::size_t i = 0; i < expected.nll.size(); ++i) {
    EXPECT_NEAR(result["nll"][i].get<double>(), expected.nll[i], 1e-9);
  }
  ASSERT_EQ(result["top"].size(), expected.top.size());
  for (std::size_t i = 0; i < expected.top.size(); ++i) {
    EXPECT_EQ(result["top"][i]["pos"], expected.top[i].pos);
    EXPECT_EQ(result["top"][i]["ids"], json(expected.top[i].ids));
    EXPECT_EQ(result["top"][i]["logprob"].size(), 3U);
  }
}

TEST_F(Text, ScoreInChunksHasNothingBeforeEach) {
  const std::string file = folder_.write("ids.json", json(models::random_ids(25)).dump());
  const json result =
      run_program({"score", path_, "--ids", file, "--n-ctx", "10", "--top", "1", "-q"}).json();
  ASSERT_EQ(result["nll"].size(), 24U);
  for (std::size_t i = 0; i < 24; ++i) EXPECT_EQ(result["nll"][i].is_null(), i == 9 || i == 19);
  const json two =
      run_program({"score", path_, "--ids", file, "--n-ctx", "10", "--chunks", "2", "-q"}).json();
  EXPECT_EQ(two["ids"].size(), 20U);
  EXPECT_EQ(two["nll"], json(std::vector<json>(result["nll"].begin(), result["nll"].begin() + 19)));
}

TEST_F(Text, ScoreNamesBadIds) {
  const auto score = [&](const std::string& name, const std::string& bytes) {
    return run_program({"score", path_, "--ids", folder_.write(name, bytes), "-q"});
  };
  expect_one_line_error(score("a.json", "[1, 80]"), 1, "id 80 at index 1, expected");
  expect_one_line_error(score("b.json", "[1, 2.5]"), 1, "2.5");
  expect_one_line_error(score("c.json", "{\"tokens\": [1]}"), 1, "input_ids");
  expect_one_line_error(score("d.json", "[1,"), 1, "not JSON");
  expect_one_line_error(score("e.u32", "12345"), 1, "found 5 bytes, expected a multiple of 4");
  expect_one_line_error(score("f.u32", ""), 1, "empty");
  expect_one_line_error(score("g.json", json(models::random_ids(300)).dump()), 1, "--n-ctx");
}

TEST_F(Text, EvalKeysAndCount) {
  const std::string file = folder_.write("text.txt", words(600));
  const ProgramRun run = run_program(
      {"eval", path_, "--data", file, "--n-ctx", "64", "--chunks", "3", "-o", "json", "-q"});
  ASSERT_EQ(run.status, 0) << run.err;
  const json result = run.json();
  for (const char* key : {"perplexity", "perplexity_stderr", "n_chunks", "n_ctx", "n_tokens_scored",
                          "tokens_per_second"}) {
    EXPECT_TRUE(result.contains(key)) << key;
  }
  EXPECT_EQ(result["n_chunks"], 3);
  EXPECT_EQ(result["n_tokens_scored"], 3 * 31);
  EXPECT_GT(result["perplexity"].get<double>(), 1.0);
  EXPECT_EQ(run.err, "");
}

TEST_F(Text, EvalTakesIdsAsWellAsText) {
  const std::string text = folder_.write("text.txt", words(600));
  const std::string ids =
      folder_.write("ids.u32", run_program({"tokenize", path_, "--file", text, "-o", "u32"}).out);
  const auto perplexity = [&](const std::string& data) {
    return run_program({"eval", path_, "--data", data, "--n-ctx", "64", "-o", "json", "-q"})
        .json()["perplexity"];
  };
  EXPECT_EQ(perplexity(ids), perplexity(text));
}

TEST_F(Text, EvalOfTooLittle) {
  expect_one_line_error(
      run_program({"eval", path_, "--data", folder_.write("empty.txt", ""), "-q"}), 1,
      "empty.txt: empty");
  expect_one_line_error(
      run_program({"eval", path_, "--data", folder_.write("short.txt", "the"), "-q"}), 1, "512");
  expect_one_line_error(run_program({"eval", path_, "--data", "/nowhere.txt", "-q"}), 1,
                        "/nowhere.txt: cannot read: No such file");
  expect_one_line_error(run_program({"eval", path_, "--data", folder_.path(), "-q"}), 1,
                        "Is a directory");
}

}  // namespace
}  // namespace moesaic::tools
