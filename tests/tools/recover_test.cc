// recover, and convert --recipe best: training of a hybrid, cut and resumed.

#include <gtest/gtest.h>

#include <csignal>
#include <cstring>
#include <deque>
#include <fstream>

#include "models/gguf.h"
#include "models/gguf_writer.h"
#include "tests/tools/program.h"

namespace moesaic::tools {
namespace {

using models::TinyModel;
using models::TinyOptions;
using nlohmann::json;

class Recover : public testing::TestWithParam<TinyOptions> {
 protected:
  // A hybrid of the model, its experts then spoilt: on a text of few words these small models come
  // out of the layer-wise stage nearly exact.
  void convert(const std::string& output) {
    const std::string good = (folder_.path() / "good.gguf").string();
    const ProgramRun run =
        run_program({"convert", model_.path, "-o", good, "--data", text_, "--tokens", "4096",
                     "--active", "0.6", "-t", "2", "-q", "--recipe", "low-rank"});
    ASSERT_EQ(run.status, 0) << run.err;
    const auto file = models::GgufFile::open(good);
    models::GgufWriter writer;
    for (const auto& [key, value] : file->metadata()) writer.set(key, value);
    std::deque<std::vector<float>> spoilt;
    for (const models::GgufTensor& t : file->tensors()) {
      std::span<const std::byte> data(t.data, static_cast<std::size_t>(t.bytes));
      if (t.name.ends_with(".moe.experts.weight")) {
        ASSERT_EQ(t.dtype, DType::F32);
        std::vector<float>& values = spoilt.emplace_back(data.size() / sizeof(float));
        std::memcpy(values.data(), data.data(), data.size());
        for (float& v : values) v *= 1.5F;
        data = std::as_bytes(std::span(values));
      }
      writer.add_tensor(t.name, t.dtype, t.dims, data);
    }
    writer.write(output);
  }
  std::vector<std::string> line(const std::string& output) const {
    return {
        "recover", model_.path.string(), hybrid_, "-o", output, "--data", text_, "--recover-tokens",
        "16384",   "--judge-every",      "2",     "-t", "2"};
  }

  TinyModel model_{GetParam(), [](TinyModel& m) { add_vocabulary(m); }};
  TemporaryFolder folder_;
  std::string text_ = folder_.write("text.txt", words(30000));
  std::string hybrid_ = (folder_.path() / "hybrid.gguf").string();
  std::string output_ = (folder_.path() / "better.gguf").string();
};

TEST_P(Recover, LowersTheDivergenceAndWritesAHybrid) {
  convert(hybrid_);
  const ProgramRun run = run_program(line(output_));
  ASSERT_EQ(run.status, 0) << run.err;
  const json report = json::parse(std::ifstream(output_ + ".report.json"));
  const json& recovery = report.at("recovery");
  EXPECT_LT(recovery.at("kl_trained"), recovery.at("kl_start"));
  EXPECT_LT(recovery.at("kl_packed"), recovery.at("kl_start"));
  EXPECT_EQ(recovery.at("tokens"), 16384);
  EXPECT_EQ(recovery.at("curve").size(), 8U);
  EXPECT_NE(bytes(output_ + ".report.html").find("fig-recovery"), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(output_ + ".state"));
  // Everything but the converted layers' tensors is as it was.
  const auto before = models::GgufFile::open(hybrid_);
  const auto after = models::GgufFile::open(output_);
  ASSERT_EQ(before->tensors().size(), after->tensors().size());
  EXPECT_EQ(after->get_int("moesaic.recovery.tokens"), 16384);
  bool changed = false;
  for (const models::GgufTensor& t : before->tensors()) {
    const models::GgufTensor* other = after->find_tensor(t.name);
    ASSERT_NE(other, nullptr) << t.name;
    ASSERT_EQ(other->bytes, t.bytes) << t.name;
    const bool same = std::equal(t.data, t.data + t.bytes, other->data);
    if (t.name.find(".moe.") == std::string::npos) {
      EXPECT_TRUE(same) << t.name;
    } else {
      changed = changed || !same;
    }
  }
  EXPECT_TRUE(changed);
  // What the program measures on the text agrees in direction.
  const auto divergence = [&](const std::string& hybrid) {
    const ProgramRun compared =
        run_program({"compare", model_.path.string(), hybrid, "--data", text_, "--n-ctx", "256",
                     "--chunks", "8", "-r", "1", "-o", "json", "-q"});
    EXPECT_EQ(compared.status, 0) << compared.err;
    return json::parse(compared.out).at("kl_mean").get<double>();
  };
  EXPECT_LT(divergence(output_), divergence(hybrid_));
}

TEST_P(Recover, AttentionLearnsWhereAsked) {
  convert(hybrid_);
  std::vector<std::string> asked = line(output_);
  asked.insert(asked.end(), {"--train", "attention", "-q"});
  const ProgramRun run = run_program(asked);
  ASSERT_EQ(run.status, 0) << run.err;
  const auto before = models::GgufFile::open(hybrid_);
  const auto after = models::GgufFile::open(output_);
  int changed = 0;
  for (const models::GgufTensor& t : before->tensors()) {
    if (t.name.find(".attn_") == std::string::npos) continue;
    const models::GgufTensor* other = after->find_tensor(t.name);
    ASSERT_NE(other, nullptr) << t.name;
    ASSERT_EQ(other->dims, t.dims) << t.name;
    changed += std::equal(t.data, t.data + t.bytes, other->data) ? 0 : 1;
  }
  EXPECT_GE(changed, 4);
  asked[asked.size() - 2] = "everything";
  expect_one_line_error(run_program(asked), 2, "--train");
}

TEST_P(Recover, CutAndResumedGivesTheSameFile) {
  convert(hybrid_);
  const std::string whole = (folder_.path() / "whole.gguf").string();
  const ProgramRun uncut = run_program(line(whole));
  ASSERT_EQ(uncut.status, 0) << uncut.err;
  const ProgramRun cut = run_program_and_signal(line(output_), "step 2 of", SIGTERM);
  if (cut.status == 0) GTEST_SKIP() << "the training was over before the signal came";
  EXPECT_FALSE(std::filesystem::exists(output_));
  EXPECT_NE(cut.err.find("--resume"), std::string::npos) << cut.err;
  // Not without saying so, and not with other options.
  std::vector<std::string> again = line(output_);
  again.emplace_back("-q");
  expect_one_line_error(run_program(again), 1, "--resume");
  again.emplace_back("--resume");
  std::vector<std::string> other = again;
  other.insert(other.end(), {"--router-rate", "0.5"});
  expect_one_line_error(run_program(other), 1, "rate");
  const ProgramRun resumed = run_program(again);
  ASSERT_EQ(resumed.status, 0) << resumed.err;
  EXPECT_EQ(bytes(output_), bytes(whole));
}

TEST_P(Recover, BestConvertsAndRecovers) {
  const auto line = [&](const std::string& output) {
    return std::vector<std::string>{"convert",
                                    model_.path.string(),
                                    "-o",
                                    output,
                                    "--data",
                                    text_,
                                    "--tokens",
                                    "4096",
                                    "--active",
                                    "0.6",
                                    "--recover-tokens",
                                    "16384",
                                    "--recipe",
                                    "best",
                                    "-t",
                                    "2",
                                    "--judge-every",
                                    "2",
                                    "--self-tokens",
                                    "512"};
  };
  const std::string whole = (folder_.path() / "whole.gguf").string();
  const ProgramRun uncut = run_program(line(whole));
  ASSERT_EQ(uncut.status, 0) << uncut.err;
  const json report = json::parse(std::ifstream(whole + ".report.json"));
  EXPECT_EQ(report.at("recovery").at("tokens"), 16384);
  EXPECT_EQ(report.at("recipe"), "best");
  EXPECT_EQ(models::GgufFile::open(whole)->get_string("moesaic.recipe"), "best");
  const ProgramRun cut = run_program_and_signal(line(output_), "step 2 of", SIGKILL);
  if (cut.status == 0) GTEST_SKIP() << "the training was over before the signal came";
  std::vector<std::string> again = line(output_);
  again.insert(again.end(), {"--resume", "-q"});
  const ProgramRun resumed = run_program(again);
  ASSERT_EQ(resumed.status, 0) << resumed.err;
  EXPECT_EQ(bytes(output_), bytes(whole));
  EXPECT_FALSE(std::filesystem::exists(output_ + ".state"));
}

INSTANTIATE_TEST_SUITE_P(
    Models, Recover,
    testing::Values(TinyOptions{.n_layers = 2, .tied = false},
                    TinyOptions{
                        .architecture = "gemma3", .n_layers = 2, .window = 16, .tied = false}),
    [](const auto& info) { return info.param.architecture; });

class RecoverErrors : public testing::Test {
 protected:
  TinyModel model_{{.n_layers = 2}, [](TinyModel& m) { add_vocabulary(m); }};
  TinyModel stranger_{{.n_layers = 2, .moe_layers = {1}}, [](TinyModel& m) { add_vocabulary(m); }};
  TemporaryFolder folder_;
  std::string text_ = folder_.write("text.txt", words(3000));
  std::string output_ = (folder_.path() / "better.gguf").string();
};

TEST_F(RecoverErrors, HybridOfAnotherCheckpoint) {
  expect_one_line_error(run_program({"recover", model_.path.string(), stranger_.path.string(), "-o",
                                     output_, "--data", text_, "-q"}),
                        1, "was made of the checkpoint with SHA-256");
}

TEST_F(RecoverErrors, DenseInTheHybridsPlace) {
  expect_one_line_error(run_program({"recover", model_.path.string(), model_.path.string(), "-o",
                                     output_, "--data", text_, "-q"}),
                        1, "has no converted layer");
}

TEST_F(RecoverErrors, OutputThatIsAnInput) {
  expect_one_line_error(run_program({"recover", model_.path.string(), stranger_.path.string(), "-o",
                                     stranger_.path.string(), "--data", text_, "-q"}),
                        2, "is one of the inputs");
}

TEST_F(RecoverErrors, FastDoesNotRecover) {
  expect_one_line_error(run_program({"convert", model_.path.string(), "-o", output_, "--data",
                                     text_, "--recover-tokens", "512", "-q"}),
                        1, "--recover-tokens: the recipe \"fast\" does not recover");
}

}  // namespace
}  // namespace moesaic::tools
