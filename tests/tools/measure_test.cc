// compare, inspect: tables and JSON keys.

#include <gtest/gtest.h>

#include "tests/tools/program.h"

namespace moesaic::tools {
namespace {

using models::TinyModel;
using nlohmann::json;

class Measure : public testing::Test {
 protected:
  // Room for the 512 tokens of pp512.
  static void prepare(TinyModel& model) {
    add_vocabulary(model);
    model.set("llama.context_length", models::GgufValue::u32(1024));
  }

  TinyModel dense_{{}, prepare};
  TinyModel hybrid_{{.moe_layers = {0, 1}}, prepare};
  TemporaryFolder folder_;
};

TEST_F(Measure, CompareKeys) {
  const std::string text = folder_.write("text.txt", words(600));
  const ProgramRun run =
      run_program({"compare", dense_.path, hybrid_.path, "--data", text, "--n-ctx", "64",
                   "--chunks", "2", "-r", "1", "-o", "json", "-q"});
  ASSERT_EQ(run.status, 0) << run.err;
  const json result = run.json();
  for (const char* side : {"dense", "hybrid"}) {
    for (const char* key : {"perplexity", "perplexity_stderr", "prefill_tps", "decode_tps",
                            "bytes_per_token", "active_fraction", "file_bytes", "resident_bytes"}) {
      EXPECT_TRUE(result[side].contains(key)) << side << " " << key;
      EXPECT_GT(result[side][key].get<double>(), 0.0) << side << " " << key;
    }
  }
  EXPECT_EQ(result["dense"]["active_fraction"], 1.0);
  EXPECT_LT(result["hybrid"]["active_fraction"].get<double>(), 1.0);
  EXPECT_EQ(result["dense"]["file_bytes"], std::filesystem::file_size(dense_.path));
  EXPECT_GT(result["kl_mean"].get<double>(), 0.0);
  EXPECT_TRUE(result.contains("kl_stderr"));
  EXPECT_TRUE(result.contains("top1_agreement"));
}

TEST_F(Measure, CompareWithItselfDivergesByNothing) {
  const std::string text = folder_.write("text.txt", words(600));
  const ProgramRun run = run_program({"compare", dense_.path, dense_.path, "--data", text,
                                      "--n-ctx", "64", "-r", "1", "-o", "json", "-q"});
  ASSERT_EQ(run.status, 0) << run.err;
  EXPECT_EQ(run.json()["kl_mean"], 0.0);
  EXPECT_EQ(run.json()["top1_agreement"], 1.0);
}

TEST_F(Measure, CompareTableIsOneTable) {
  const std::string text = folder_.write("text.txt", words(600));
  const ProgramRun run = run_program(
      {"compare", dense_.path, hybrid_.path, "--data", text, "--n-ctx", "64", "-r", "1", "-q"});
  ASSERT_EQ(run.status, 0) << run.err;
  for (const char* row :
       {"perplexity", "KL divergence", "top-1 agreement", "pp512", "tg128",
        "bytes read per decoded token", "active fraction", "file size", "resident memory"}) {
    EXPECT_NE(run.out.find(row), std::string::npos) << row;
  }
}

TEST_F(Measure, InspectDescribesLayers) {
  const ProgramRun run =
      run_program({"inspect", hybrid_.path, "-o", "json", "-p", "the river", "-q"});
  ASSERT_EQ(run.status, 0) << run.err;
  const json result = run.json();
  EXPECT_EQ(result["architecture"], "llama");
  EXPECT_EQ(result["n_layers"], 2);
  ASSERT_EQ(result["layers"].size(), 2U);
  EXPECT_EQ(result["layers"][0]["kind"], "glu+low_rank");
  EXPECT_EQ(result["layers"][0]["n_experts"], TinyModel::kExperts);
  EXPECT_EQ(result["layers"][0]["n_active"], TinyModel::kActive);
  EXPECT_EQ(result["experts"]["n_tokens"], 8);
  const json& most = result["experts"]["layers"][1]["most_used"];
  ASSERT_FALSE(most.empty());
  EXPECT_LE(most[0]["share"].get<double>(), 1.0);
  EXPECT_GE(most[0]["share"].get<double>(), most[1]["share"].get<double>());
  const ProgramRun table = run_program({"inspect", dense_.path});
  EXPECT_EQ(table.status, 0);
  EXPECT_NE(table.out.find("general.architecture"), std::string::npos);
}

}  // namespace
}  // namespace moesaic::tools
