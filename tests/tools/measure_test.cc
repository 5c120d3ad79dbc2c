// compare, inspect: tables and JSON keys.

#include <gtest/gtest.h>

#include <fstream>

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
  ASSERT_EQ(run.json()["texts"].size(), 1U);
  EXPECT_EQ(run.json()["texts"][0]["kl"]["max"], 0.0);
  EXPECT_EQ(run.json()["texts"][0]["ppl_ratio"], 1.0);
  EXPECT_FALSE(run.json().contains("out_of_domain"));
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

TEST_F(Measure, CompareOverSeveralTexts) {
  const std::string in = folder_.write("in.txt", words(600));
  const std::string out = folder_.write("out.txt", std::string(words(900)).substr(211));
  const std::string file = (folder_.path() / "a.compare.json").string();
  const ProgramRun run =
      run_program({"compare", "--data", in, dense_.path, "--data", out, hybrid_.path, "--n-ctx",
                   "64", "-r", "1", "-q", "--json-file", file});
  ASSERT_EQ(run.status, 0) << run.err;
  for (const char* part :
       {"in.txt (in-domain)", "out.txt (out of domain)", "Cor(ln(PPL(Q)), ln(PPL(base)))",
        "Mean PPL(Q)/PPL(base)", "99.9%", "RMS", "Same top p", "times that"}) {
    EXPECT_NE(run.out.find(part), std::string::npos) << part;
  }
  const json result = json::parse(std::ifstream(file));
  EXPECT_EQ(result["hybrid"]["recipe"], "test");
  EXPECT_FALSE(result["dense"].contains("recipe"));
  ASSERT_EQ(result["texts"].size(), 2U);
  EXPECT_EQ(result["texts"][1]["data"], out);
  for (const json& text : result["texts"]) {
    for (const char* key :
         {"n_chunks", "n_tokens_scored", "active_fraction", "ln_ppl_correlation", "ln_ppl_ratio",
          "ln_ppl_ratio_stderr", "ppl_ratio", "ppl_ratio_stderr", "ppl_difference",
          "ppl_difference_stderr", "same_top_p", "same_top_p_stderr"}) {
      EXPECT_TRUE(text[key].is_number()) << key;
    }
    for (const char* key : {"mean", "stderr", "max", "p99_9", "p99", "p95", "p90", "p75", "median",
                            "p25", "p10", "p5", "p1", "p0_1", "min"}) {
      EXPECT_TRUE(text["kl"][key].is_number()) << key;
      EXPECT_TRUE(text["delta_p"][key].is_number()) << key;
    }
    EXPECT_TRUE(text["delta_p"]["rms"].is_number());
    EXPECT_TRUE(text["delta_p"]["rms_stderr"].is_number());
    const double ratio =
        text["hybrid"]["perplexity"].get<double>() / text["dense"]["perplexity"].get<double>();
    EXPECT_NEAR(text["ppl_ratio"].get<double>(), ratio, 1e-9 * ratio);
  }
  // What stands at the top is of the first text.
  EXPECT_EQ(result["kl_mean"], result["texts"][0]["kl"]["mean"]);
  EXPECT_EQ(result["top1_agreement"], result["texts"][0]["same_top_p"]);
  EXPECT_EQ(result["hybrid"]["perplexity"], result["texts"][0]["hybrid"]["perplexity"]);
  EXPECT_DOUBLE_EQ(result["out_of_domain"].get<double>(),
                   result["texts"][1]["ppl_ratio"].get<double>() /
                       result["texts"][0]["ppl_ratio"].get<double>());
}

TEST_F(Measure, CompareNamesTheTextThatIsTooShort) {
  const std::string text = folder_.write("text.txt", words(600));
  const std::string other = folder_.write("short.txt", "the river");
  expect_one_line_error(run_program({"compare", dense_.path, hybrid_.path, "--data", text, "--data",
                                     other, "--n-ctx", "64", "-r", "1", "-q"}),
                        1, "short.txt: 8 tokens, expected at least 64");
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

// Windows of 16 with a BOS in front are 15 tokens of text each.
TEST_F(Measure, InspectCountsExpertsOverAText) {
  const std::string text = folder_.write("text.txt", words(200));
  const ProgramRun run = run_program({"inspect", hybrid_.path, "--data", text, "--n-ctx", "16",
                                      "--chunks", "5", "-o", "json", "-q"});
  ASSERT_EQ(run.status, 0) << run.err;
  const json experts = run.json()["experts"];
  EXPECT_EQ(experts["n_tokens"], 80);
  EXPECT_FALSE(experts.contains("top_tokens"));
  ASSERT_EQ(experts["layers"].size(), 2U);
  for (const json& layer : experts["layers"]) {
    ASSERT_EQ(layer["counts"].size(), static_cast<std::size_t>(TinyModel::kExperts));
    std::int64_t sum = 0, used = 0;
    for (const json& count : layer["counts"]) {
      sum += count.get<std::int64_t>();
      used += count > 0 ? 1 : 0;
    }
    EXPECT_EQ(sum, 80 * TinyModel::kActive);
    EXPECT_EQ(layer["n_used"], used);
    EXPECT_EQ(layer["n_never"], TinyModel::kExperts - used);
    EXPECT_EQ(layer["never"].size(), layer["n_never"].get<std::size_t>());
    for (const json& id : layer["never"]) EXPECT_EQ(layer["counts"][id.get<std::size_t>()], 0);
    const json& first = layer["most_used"][0];
    EXPECT_DOUBLE_EQ(first["share"].get<double>(),
                     layer["counts"][first["expert"].get<std::size_t>()].get<double>() / 80);
  }
}

TEST_F(Measure, InspectShowsTheTokensOfAnExpert) {
  const std::string text = folder_.write("text.txt", words(200));
  const auto inspect = [&](const std::vector<std::string>& more) {
    std::vector<std::string> line = {"inspect", hybrid_.path, "--data", text,
                                     "--n-ctx", "16",         "-q"};
    line.insert(line.end(), more.begin(), more.end());
    return run_program(line);
  };
  const json first = inspect({"-o", "json"}).json()["experts"];
  const auto busy = first["layers"][1]["most_used"][0]["expert"].get<std::int64_t>();
  const std::string id = "1:" + std::to_string(busy);
  const ProgramRun run = inspect({"--experts", id + ",0:3", "--top-tokens", "4", "-o", "json"});
  ASSERT_EQ(run.status, 0) << run.err;
  const json shown = run.json()["experts"]["top_tokens"];
  ASSERT_EQ(shown.size(), 2U);
  EXPECT_EQ(shown[0]["layer"], 1);
  EXPECT_EQ(shown[0]["expert"], busy);
  EXPECT_EQ(shown[0]["share"], first["layers"][1]["most_used"][0]["share"]);
  ASSERT_EQ(shown[0]["tokens"].size(), 4U);
  for (std::size_t i = 0; i < 4; ++i) {
    const json& token = shown[0]["tokens"][i];
    for (const char* key : {"place", "id", "text", "before", "after", "contribution"}) {
      EXPECT_TRUE(token.contains(key)) << key;
    }
    if (i > 0) {
      EXPECT_LE(token["contribution"].get<double>(),
                shown[0]["tokens"][i - 1]["contribution"].get<double>());
    }
    // Its context is that of the text, and ends with the window.
    if (token["place"].get<int>() % 16 == 0) {
      EXPECT_EQ(token["before"], "");
    } else {
      const std::string around = token["before"].get<std::string>() +
                                 token["text"].get<std::string>() +
                                 token["after"].get<std::string>();
      const std::size_t tag = around.find('>');
      EXPECT_NE(words(200).find(tag == around.npos ? around : around.substr(tag + 1)),
                std::string::npos)
          << around;
    }
  }
  const ProgramRun table = inspect({"--top-tokens", "2"});
  EXPECT_EQ(table.status, 0) << table.err;
  EXPECT_NE(table.out.find("layer 1, expert " + std::to_string(busy) + ": fires for"),
            std::string::npos);
  EXPECT_NE(table.out.find("never fire"), std::string::npos);
}

TEST_F(Measure, InspectRefusesExpertsThatAreNone) {
  const auto refuse = [&](const std::vector<std::string>& more, int status,
                          const std::string& part) {
    std::vector<std::string> line = {"inspect", hybrid_.path, "-q"};
    line.insert(line.end(), more.begin(), more.end());
    expect_one_line_error(run_program(line), status, part);
  };
  refuse({"-p", "the", "--experts", "1"}, 2, "expected LAYER:EXPERT");
  refuse({"-p", "the", "--experts", "1:x"}, 2, "expected LAYER:EXPERT");
  refuse({"--experts", "1:2"}, 2, "need a text");
  refuse({"-p", "the", "--data", "x"}, 2, "excludes");
  refuse({"-p", "the", "--experts", "2:0"}, 1, "no such layer");
  refuse({"-p", "the", "--experts", "1:40"}, 1, "layer 1 has experts 0 to 39");
}

}  // namespace
}  // namespace moesaic::tools
