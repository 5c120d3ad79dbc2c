// study: the whole command on a tiny checkpoint.

#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <limits>

#include "tests/tools/program.h"

namespace moesaic::tools {
namespace {

using models::TinyModel;
using nlohmann::json;

class Study : public testing::Test {
 protected:
  std::vector<std::string> line(const std::vector<std::string>& more = {}) const {
    std::vector<std::string> arguments = {
        "study",    model_.path, "--layer",      "1",  "--data",           text_,
        "--tokens", "6144",      "--experts",    "40", "--active-neurons", "16,4",
        "--rank",   "8",         "--passes",     "2",  "--rates",          "1e-3,1e-2",
        "-t",       "1",         "--batch-size", "256"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }

  // What was measured, without how long it took.
  static std::string figures(json report) {
    report.erase("seconds");
    for (auto& cell : report["cells"]) cell.erase("seconds");
    return report.dump();
  }

  TinyModel model_{{.n_layers = 3}, [](TinyModel& m) { add_vocabulary(m); }};
  TemporaryFolder folder_;
  std::string text_ = folder_.write("text.txt", words(40000));
};

TEST_F(Study, TableJsonAndPicture) {
  const std::string svg = (folder_.path() / "study.svg").string();
  const std::string file = (folder_.path() / "study.json").string();
  const ProgramRun run = run_program(line({"--svg", svg, "--json-file", file, "-q"}));
  ASSERT_EQ(run.status, 0) << run.err;
  EXPECT_EQ(run.err, "");
  EXPECT_NE(run.out.find("| without sinks |"), std::string::npos) << run.out;
  EXPECT_EQ(run.out.find("paper's"), std::string::npos);  // of another layer
  const json report = json::parse(std::ifstream(file));
  for (const char* key : {"model", "layer", "n_fit", "n_choose", "n_held_out", "n_held_out_sinks",
                          "sink_share", "passes", "rates", "seed", "cells"}) {
    EXPECT_TRUE(report.contains(key)) << key;
  }
  ASSERT_EQ(report["cells"].size(), 12U);
  for (const json& cell : report["cells"]) {
    const std::string name = cell["inputs"].get<std::string>() + cell["family"].get<std::string>();
    for (const char* key : {"unexplained", "unexplained_without_sinks"}) {
      EXPECT_GT(cell[key].get<double>(), 0) << name;
      EXPECT_LT(cell[key].get<double>(), 2) << name;
    }
    EXPECT_EQ(cell["by_rate"].size(), 2U) << name;
    EXPECT_GT(cell["active_fraction"].get<double>(), 0) << name;
    EXPECT_TRUE(cell["published"].is_null()) << name;
  }
  EXPECT_EQ(report["cells"][0]["active_neurons"], 4);
  EXPECT_EQ(report["cells"][1]["active_neurons"], 16);
  std::ifstream picture(svg);
  const std::string drawn{std::istreambuf_iterator<char>(picture), {}};
  EXPECT_EQ(drawn.rfind("<svg", 0), 0U);
}

TEST_F(Study, RepeatsAndTakesOverFinishedCells) {
  const std::string cells = (folder_.path() / "cells").string();
  const ProgramRun plain = run_program(line({"-o", "json", "-q"}));
  const ProgramRun first = run_program(line({"-o", "json", "--resume", cells}));
  ASSERT_EQ(first.status, 0) << first.err;
  EXPECT_EQ(first.err.find("kept from an earlier run"), std::string::npos);
  EXPECT_EQ(figures(plain.json()), figures(first.json()));
  const ProgramRun second = run_program(line({"-o", "json", "--resume", cells}));
  ASSERT_EQ(second.status, 0) << second.err;
  EXPECT_EQ(figures(second.json()), figures(first.json()));
  EXPECT_EQ(second.err.find("rate 0.001"), std::string::npos) << second.err;  // nothing trained
  // Another seed is another job: nothing of it is there.
  const ProgramRun other = run_program(line({"-o", "json", "--resume", cells, "--seed", "1"}));
  ASSERT_EQ(other.status, 0) << other.err;
  EXPECT_NE(figures(other.json()), figures(first.json()));
  EXPECT_EQ(other.err.find("kept from an earlier run"), std::string::npos);
  for (const auto& entry : std::filesystem::directory_iterator(cells)) {
    std::ofstream(entry.path()) << "{";
  }
  expect_one_line_error(run_program(line({"--resume", cells, "-q"})), 1, "is no kept result");
}

TEST_F(Study, WhatMakesNoSense) {
  const auto refused = [&](const std::vector<std::string>& more, int status, const char* part) {
    std::vector<std::string> arguments = line(more);
    arguments.emplace_back("-q");
    expect_one_line_error(run_program(arguments), status, part);
  };
  refused({"--families", "sparse"}, 2, "--families");
  refused({"--own-passes", "4"}, 2, "--own-passes");
  refused({"--svg", "/nowhere/study.svg"}, 1, "/nowhere");
  std::vector<std::string> arguments = line({"-q"});
  arguments[3] = "3";
  expect_one_line_error(run_program(arguments), 1, "has layers 0 to 2");
  arguments = line({"-q"});
  arguments[11] = "400";  // 200 of 40 experts
  expect_one_line_error(run_program(arguments), 1, "selects 200 from 40 experts");
}

TEST_F(Study, NanNamesTheLayer) {
  const TinyModel damaged({.n_layers = 3}, [](TinyModel& m) {
    add_vocabulary(m);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::memcpy(m.tensor("blk.1.ffn_up.weight").data.data(), &nan, sizeof(nan));
  });
  std::vector<std::string> arguments = line({"-q"});
  arguments[1] = damaged.path.string();
  expect_one_line_error(run_program(arguments), 1, "layer 1 gives NaN");
}

}  // namespace
}  // namespace moesaic::tools
