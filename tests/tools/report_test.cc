// report: from what compare leaves to the table and the page.

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>

#include "tests/tools/program.h"

namespace moesaic::tools {
namespace {

using models::TinyModel;
using nlohmann::json;

TEST(Report, DrawsWhatCompareLeft) {
  const auto prepare = [](TinyModel& model) {
    add_vocabulary(model);
    model.set("llama.context_length", models::GgufValue::u32(1024));
  };
  const TinyModel dense({}, prepare), hybrid({.moe_layers = {0, 1}}, prepare);
  const TemporaryFolder folder;
  const std::string in = folder.write("in.txt", words(600));
  const std::string out = folder.write("out.txt", words(900).substr(300));
  const ProgramRun compared = run_program(
      {"compare", dense.path, hybrid.path, "--data", in, "--data", out, "--n-ctx", "64", "-r", "1",
       "-o", "json", "-q", "--json-file", (folder.path() / "a.compare.json").string()});
  ASSERT_EQ(compared.status, 0) << compared.err;
  const json left = compared.json();

  const ProgramRun run = run_program({"report", folder.path(), "-o", "json"});
  ASSERT_EQ(run.status, 0) << run.err;
  ASSERT_EQ(run.json()["runs"].size(), 1U);
  const json one = run.json()["runs"][0];
  EXPECT_EQ(one["name"], hybrid.path.filename().string());
  EXPECT_EQ(one["dense"], dense.path.filename().string());
  EXPECT_EQ(one["recipe"], "test");
  EXPECT_EQ(one["data"], "in.txt");
  EXPECT_EQ(one["source"], "a.compare.json");
  EXPECT_EQ(one["compared"], true);
  EXPECT_EQ(one["best"], true);
  EXPECT_TRUE(one["seconds"].is_null());
  EXPECT_EQ(one["active_fraction"], left["texts"][0]["active_fraction"]);
  EXPECT_EQ(one["perplexity"], left["hybrid"]["perplexity"]);
  EXPECT_EQ(one["perplexity_dense"], left["dense"]["perplexity"]);
  EXPECT_NEAR(one["ratio"].get<double>(), left["texts"][0]["ppl_ratio"].get<double>(),
              1e-9 * one["ratio"].get<double>());
  EXPECT_EQ(one["ratio_out_of_domain"], left["texts"][1]["ppl_ratio"]);
  EXPECT_EQ(one["kl_mean"], left["kl_mean"]);
  EXPECT_EQ(one["top1_agreement"], left["top1_agreement"]);

  const std::string page = (folder.path() / "page.html").string();
  const ProgramRun drawn = run_program({"report", folder.path(), "-o", page});
  ASSERT_EQ(drawn.status, 0) << drawn.err;
  EXPECT_NE(drawn.out.find("| hybrid"), std::string::npos);
  std::ifstream file(page);
  const std::string html{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  EXPECT_NE(html.find("<svg "), std::string::npos);
  EXPECT_NE(html.find(hybrid.path.filename().string()), std::string::npos);
}

TEST(Report, FolderWithoutRuns) {
  const TemporaryFolder folder;
  expect_one_line_error(run_program({"report", folder.path()}), 1, "holds no *.compare.json");
  expect_one_line_error(run_program({"report", (folder.path() / "none").string()}), 1,
                        "cannot read the folder");
  folder.write("a.compare.json", "{");
  expect_one_line_error(run_program({"report", folder.path()}), 1, "a.compare.json");
}

}  // namespace
}  // namespace moesaic::tools
