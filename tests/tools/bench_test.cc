// bench: llama-bench's table, keys and formats; the sweep over batch size and active fraction.

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <sstream>

#include "kernels/neurons.h"
#include "tests/tools/program.h"

namespace moesaic::tools {
namespace {

using models::TinyModel;
using nlohmann::json;

class Bench : public testing::Test {
 protected:
  static void prepare(TinyModel& model) { add_vocabulary(model); }

  static std::vector<std::string> lines(const std::string& text) {
    std::vector<std::string> all;
    std::istringstream stream(text);
    for (std::string line; std::getline(stream, line);) all.push_back(line);
    return all;
  }
  static std::string file_text(const std::filesystem::path& path) {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  TinyModel dense_{{}, prepare};
  TinyModel hybrid_{{.moe_layers = {0, 1}}, prepare};
  TemporaryFolder folder_;
};

TEST_F(Bench, JsonHasLlamaBenchKeysAndOurs) {
  const ProgramRun run = run_program(
      {"bench", hybrid_.path, "-p", "16", "-n", "4,8", "-r", "2", "-o", "json", "-t", "2", "-q"});
  ASSERT_EQ(run.status, 0) << run.err;
  const json tests = run.json();
  ASSERT_EQ(tests.size(), 3U);
  for (const json& test : tests) {
    for (const char* key : {"build_commit",    "cpu_info",
                            "backends",        "model_filename",
                            "model_type",      "model_size",
                            "model_n_params",  "n_batch",
                            "n_ubatch",        "n_threads",
                            "type_k",          "type_v",
                            "n_prompt",        "n_gen",
                            "n_depth",         "n_sequences",
                            "test_time",       "avg_ns",
                            "stddev_ns",       "avg_ts",
                            "stddev_ts",       "samples_ns",
                            "samples_ts",      "activations",
                            "bytes_per_token", "bandwidth_fraction",
                            "read_bandwidth",  "flops_per_token",
                            "flops_fraction",  "peak_flops"}) {
      EXPECT_TRUE(test.contains(key)) << key;
    }
    EXPECT_EQ(test["samples_ts"].size(), 2U);
    EXPECT_EQ(test["n_threads"], 2);
    for (const char* key : {"bytes_per_token", "flops_per_token", "read_bandwidth", "peak_flops"}) {
      EXPECT_GT(test[key].get<double>(), 0.0) << key;
    }
    const double rate = test["avg_ts"];
    EXPECT_NEAR(test["flops_fraction"].get<double>(),
                test["flops_per_token"].get<double>() * rate / test["peak_flops"].get<double>(),
                1e-9);
  }
  EXPECT_EQ(tests[0]["n_prompt"], 16);
  EXPECT_EQ(tests[2]["n_gen"], 8);
}

TEST_F(Bench, FlopsCountMatricesAttentionAndHeadWhereTheyAreNeeded) {
  const double vocab_size =
      run_program({"inspect", dense_.path, "-o", "json"}).json()["vocab_size"];
  const double d = TinyModel::kModel;
  const double q = 64 * d;
  const double kv = 2 * 32 * d;
  const double mlp = 3 * TinyModel::kFf * d;
  const double keys = 2 * 4 * 16;  // multiply-adds of one query with one key and its value
  const ProgramRun run = run_program(
      {"bench", dense_.path, "-p", "2", "-n", "1", "-d", "0,3", "-r", "1", "-o", "json", "-q"});
  ASSERT_EQ(run.status, 0) << run.err;
  const json tests = run.json();
  ASSERT_EQ(tests.size(), 4U);
  for (const int depth : {0, 3}) {
    const json& prefill = tests[depth == 0 ? 0 : 2];
    const json& decode = tests[depth == 0 ? 1 : 3];
    EXPECT_EQ(decode["n_depth"], depth);
    // The first of two layers on both tokens; the second and the head on the last one.
    const double layer = q + kv + q + mlp;
    EXPECT_DOUBLE_EQ(
        prefill["flops_per_token"].get<double>(),
        2 * (3 * layer + kv + keys * ((depth + 1) + 2 * (depth + 2)) + vocab_size * d) / 2);
    EXPECT_DOUBLE_EQ(decode["flops_per_token"].get<double>(),
                     2 * (2 * layer + 2 * keys * (depth + 1) + vocab_size * d));
  }
}

TEST_F(Bench, ListsMultiply) {
  const ProgramRun run =
      run_program({"bench", dense_.path, "-p", "8", "-n", "4", "-b", "4,8", "-d", "0,8",
                   "--sequences", "1,3", "-t", "1,2", "-r", "1", "-o", "json", "-q"});
  ASSERT_EQ(run.status, 0) << run.err;
  const json tests = run.json();
  ASSERT_EQ(tests.size(), 2U * 2 * (2 + 2));  // threads, depths, (batches + sequences)
  EXPECT_EQ(tests[0]["n_batch"], 4);
  EXPECT_EQ(tests[1]["n_batch"], 8);
  EXPECT_EQ(tests[3]["n_sequences"], 3);
  EXPECT_NEAR(tests[3]["avg_ns"].get<double>() * tests[3]["avg_ts"].get<double>(), 12e9, 1e3);
  EXPECT_EQ(tests[4]["n_depth"], 8);
  EXPECT_EQ(tests[7]["n_threads"], 1);
  EXPECT_EQ(tests[8]["n_threads"], 2);
  const ProgramRun table = run_program({"bench", dense_.path, "-p", "8", "-n", "4", "-b", "4", "-d",
                                        "8", "--npl", "3", "-r", "1", "-q"});
  ASSERT_EQ(table.status, 0) << table.err;
  EXPECT_NE(table.out.find("n_batch"), std::string::npos) << table.out;
  EXPECT_NE(table.out.find(" pp8 @ d8 |"), std::string::npos) << table.out;
  EXPECT_NE(table.out.find(" tg4 x3 @ d8 |"), std::string::npos) << table.out;
}

TEST_F(Bench, TableNamesBothLimits) {
  const ProgramRun run =
      run_program({"bench", dense_.path, "-p", "16", "-n", "4", "-r", "1", "-q"});
  ASSERT_EQ(run.status, 0) << run.err;
  EXPECT_NE(run.out.find("| pp16 |"), std::string::npos) << run.out;
  for (const char* test : {"pp16", "tg4"}) {
    const std::string line = std::string(test) + ", ";  // the last lines, one for each test
    EXPECT_NE(run.out.find("\n" + line), std::string::npos) << run.out;
  }
  EXPECT_NE(run.out.find("memory gave"), std::string::npos) << run.out;
  EXPECT_NE(run.out.find("GFLOP/s"), std::string::npos) << run.out;
  EXPECT_EQ(run.out.find("n_batch"), std::string::npos) << run.out;
}

TEST_F(Bench, CsvHasAHeaderAndOneLineATest) {
  const ProgramRun run =
      run_program({"bench", dense_.path, "-p", "16", "-n", "4", "-r", "1", "-q", "-o", "csv"});
  ASSERT_EQ(run.status, 0) << run.err;
  const std::vector<std::string> all = lines(run.out);
  ASSERT_EQ(all.size(), 3U) << run.out;
  EXPECT_EQ(all[0].rfind("build_commit,cpu_info,", 0), 0U) << run.out;
  const auto commas = [](const std::string& line) {
    return std::count(line.begin(), line.end(), ',');
  };
  EXPECT_EQ(commas(all[1]), commas(all[0])) << run.out;
  EXPECT_EQ(all[0].find("samples"), std::string::npos) << run.out;
}

TEST_F(Bench, JsonlHasOneObjectALine) {
  const ProgramRun run =
      run_program({"bench", dense_.path, "-p", "16", "-n", "4", "-r", "2", "-q", "-o", "jsonl"});
  ASSERT_EQ(run.status, 0) << run.err;
  const std::vector<std::string> all = lines(run.out);
  ASSERT_EQ(all.size(), 2U) << run.out;
  EXPECT_EQ(json::parse(all[0])["n_prompt"], 16);
  EXPECT_EQ(json::parse(all[1])["n_gen"], 4);
  EXPECT_EQ(json::parse(all[1])["samples_ts"].size(), 2U);
}

TEST_F(Bench, BeyondTheContextIsRefused) {
  expect_one_line_error(
      run_program({"bench", dense_.path, "-p", "200", "-d", "100", "-r", "1", "-q"}), 1, "context");
}

TEST_F(Bench, ListsOutOfRangeAreRefused) {
  for (const std::vector<std::string>& more : {std::vector<std::string>{"-b", "0"},
                                               {"-b", "512,0"},
                                               {"-d", "-1"},
                                               {"-d", "x"},
                                               {"--sequences", "0"},
                                               {"--sequences", "5000"},
                                               {"-t", "1,0"},
                                               {"-t", "1,2000"}}) {
    std::vector<std::string> arguments = {"bench", dense_.path};
    arguments.insert(arguments.end(), more.begin(), more.end());
    expect_one_line_error(run_program(arguments), 2, "expected a whole number");
  }
}

// The program inherits the environment: the folder stands for the user's cache.
class Costs : public Bench {
 protected:
  Costs() { setenv("MOESAIC_CACHE", folder_.path().c_str(), 1); }
  ~Costs() override { unsetenv("MOESAIC_CACHE"); }
};

TEST_F(Costs, AreMeasuredKeptAndExplainTheChoice) {
  if (!kernels::has_neurons(DType::BF16, TinyModel::kModel)) {
    GTEST_SKIP() << "needs AVX-512 with VNNI and bfloat16";
  }
  TinyModel packed({.dtype = DType::BF16, .moe_layers = {0, 1}}, prepare);
  const std::filesystem::path file = folder_.path() / "path-constants.json";
  std::ofstream(file) << R"({"another machine": {"gather": 1}})";
  const ProgramRun run = run_program(
      {"bench", packed.path, "--costs", "--sequences", "1,64", "-o", "json", "-t", "1", "-q"});
  ASSERT_EQ(run.status, 0) << run.err;
  const json result = run.json();
  const json& c = result["constants"];
  ASSERT_EQ(result["costs"].size(), 2U);
  const double active = TinyModel::kShared + TinyModel::kActive;
  const double all = TinyModel::kShared + TinyModel::kExperts;
  for (const json& row : result["costs"]) {
    const double n = row["n_tokens"];
    const double us = TinyModel::kModel / 1e3;
    EXPECT_NEAR(row["gather_us"].get<double>(), n * active * c["gather"].get<double>() * us, 1e-6);
    EXPECT_NEAR(row["masked_us"].get<double>(),
                all * std::max(n * c["masked"].get<double>(), c["masked_least"].get<double>()) * us,
                1e-6);
    const double least = std::min({row["gather_us"].get<double>(), row["grouped_us"].get<double>(),
                                   row["masked_us"].get<double>()});
    for (const char* path : {"gather", "grouped", "masked"}) {
      const bool chosen = row["layers_" + std::string(path)] == 2;
      EXPECT_EQ(row["layers_" + std::string(path)].get<int>(), chosen ? 2 : 0) << run.out;
      if (!chosen) continue;
      EXPECT_DOUBLE_EQ(row[std::string(path) + "_us"].get<double>(), least) << run.out;
    }
  }
  const json kept = json::parse(file_text(file));
  EXPECT_EQ(kept.size(), 2U) << kept;  // what stood there stays
  EXPECT_TRUE(kept.contains("another machine"));
  const ProgramRun table = run_program({"bench", packed.path, "--costs", "-q"});
  ASSERT_EQ(table.status, 0) << table.err;
  EXPECT_NE(table.out.find("\n| 512 "), std::string::npos) << table.out;
}

TEST_F(Costs, CacheThatCannotBeReadOrWrittenIsNoError) {
  if (!kernels::has_neurons(DType::BF16, TinyModel::kModel)) {
    GTEST_SKIP() << "needs AVX-512 with VNNI and bfloat16";
  }
  TinyModel packed({.dtype = DType::BF16, .moe_layers = {0}}, prepare);
  std::ofstream(folder_.path() / "path-constants.json") << "{ not JSON";
  EXPECT_EQ(run_program({"bench", packed.path, "--costs", "-q"}).status, 0);
  EXPECT_TRUE(json::parse(file_text(folder_.path() / "path-constants.json")).is_object());
  setenv("MOESAIC_CACHE", "/proc/nowhere", 1);
  EXPECT_EQ(run_program({"bench", packed.path, "--costs", "-q"}).status, 0);
}

TEST_F(Costs, Usage) {
  expect_one_line_error(run_program({"bench", dense_.path, "--costs", "-q"}), 1,
                        "expected a hybrid");
  for (const std::vector<std::string>& more :
       {std::vector<std::string>{"--crossover"}, {"-p", "1"}, {"-r", "2"}, {"-o", "csv"}}) {
    std::vector<std::string> arguments = {"bench", hybrid_.path, "--costs"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    expect_one_line_error(run_program(arguments), 2, "--costs");
  }
}

TEST_F(Bench, CrossoverSweepsBatchesAndFractions) {
  const std::filesystem::path svg = folder_.path() / "crossover.svg";
  const std::filesystem::path written = folder_.path() / "crossover.json";
  const ProgramRun run = run_program(
      {"bench", dense_.path,   "--crossover", "--hybrid", hybrid_.path, "--sequences", "1,3",
       "-n",    "2",           "-r",          "3",        "-o",         "json",        "--svg-file",
       svg,     "--json-file", written,       "-t",       "1",          "-q"});
  ASSERT_EQ(run.status, 0) << run.err;
  const json result = run.json();
  for (const char* key : {"dense", "hybrid", "cpu_info", "n_threads", "activations", "n_gen",
                          "n_depth", "repetitions", "batches"}) {
    EXPECT_TRUE(result.contains(key)) << key;
  }
  // From no routed neuron to all: d_model · (3 (shared + active) + 2 bypass + rank) + rank ·
  // experts over 3 · d_model · d_ff.
  const auto fraction = [](double active) {
    return (64 * (3 * (TinyModel::kShared + active) + 2 * 32 + 32) + 32 * 40) / (3.0 * 64 * 96);
  };
  ASSERT_EQ(result["active_fractions"].size(), 6U);
  EXPECT_DOUBLE_EQ(result["active_fractions"][0].get<double>(), fraction(0));
  EXPECT_DOUBLE_EQ(result["active_fractions"][1].get<double>(), fraction(8));
  EXPECT_DOUBLE_EQ(result["active_fractions"][5].get<double>(), fraction(40));
  ASSERT_EQ(result["points"].size(), 12U);
  for (const json& point : result["points"]) {
    EXPECT_EQ(point["dense_samples_ts"].size(), 3U);
    EXPECT_EQ(point["hybrid_samples_ts"].size(), 3U);
    EXPECT_LE(point["ratio_min"].get<double>(), point["ratio"].get<double>());
    EXPECT_LE(point["ratio"].get<double>(), point["ratio_max"].get<double>());
  }
  EXPECT_EQ(result["points"][6]["batch"], 3);
  ASSERT_EQ(result["break_even"].size(), 2U);
  EXPECT_EQ(json::parse(file_text(written)), result);
  const std::string picture = file_text(svg);
  EXPECT_EQ(picture.rfind("<svg ", 0), 0U);
  EXPECT_NE(picture.find("sequences decoded together"), std::string::npos);
}

TEST_F(Bench, CrossoverTakesTheFractionsThatAreReachable) {
  const ProgramRun run =
      run_program({"bench", dense_.path, "--crossover", "--hybrid", hybrid_.path, "--npl", "2",
                   "--active", "2,0,0.01", "-n", "1", "-r", "1", "-q"});
  ASSERT_EQ(run.status, 0) << run.err;
  const std::vector<std::string> all = lines(run.out);
  ASSERT_GT(all.size(), 3U);
  // The least fraction once, and the largest one.
  EXPECT_EQ(std::count(all[0].begin(), all[0].end(), '|'), 5) << run.out;
  EXPECT_EQ(all[2].rfind("| 2 ", 0), 0U) << run.out;
}

TEST_F(Bench, CrossoverSvgGoesToStandardOutput) {
  const ProgramRun run =
      run_program({"bench", dense_.path, "--crossover", "--hybrid", hybrid_.path, "--npl", "1",
                   "--active", "0.5", "-n", "1", "-r", "1", "-o", "svg", "-q"});
  ASSERT_EQ(run.status, 0) << run.err;
  EXPECT_EQ(run.out.rfind("<svg ", 0), 0U);
  EXPECT_EQ(run.out.find("nan"), std::string::npos);
}

TEST_F(Bench, CrossoverUsage) {
  const std::string dense = dense_.path;
  const std::string hybrid = hybrid_.path;
  expect_one_line_error(run_program({"bench", dense, "--crossover"}), 2, "--hybrid");
  expect_one_line_error(run_program({"bench", dense, "--hybrid", hybrid}), 2, "--crossover");
  expect_one_line_error(run_program({"bench", dense, "-o", "svg"}), 2, "--crossover");
  for (const std::vector<std::string>& more :
       {std::vector<std::string>{"-o", "csv"}, {"-p", "512"}, {"-n", "1,2"}, {"-t", "1,2"}}) {
    std::vector<std::string> arguments = {"bench", dense, "--crossover", "--hybrid", hybrid};
    arguments.insert(arguments.end(), more.begin(), more.end());
    expect_one_line_error(run_program(arguments), 2, "--crossover");
  }
  expect_one_line_error(run_program({"bench", dense, "--crossover", "--hybrid", dense, "-q"}), 1,
                        "expected a hybrid");
  expect_one_line_error(run_program({"bench", hybrid, "--crossover", "--hybrid", hybrid, "-q"}), 1,
                        "expected the dense model");
}

}  // namespace
}  // namespace moesaic::tools
