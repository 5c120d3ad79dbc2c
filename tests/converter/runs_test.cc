#include "converter/runs.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>

#include "kernels/base/error.h"
#include "tests/converter/markup.h"
#include "tests/converter/scratch_folder.h"

namespace moesaic::converter {
namespace {

using Json = nlohmann::json;
using Found = Run;  // in a test, Run is gtest's

class Runs : public testing::Test {
 protected:
  void write(const std::string& name, const Json& json) const {
    std::ofstream(folder_.path / name) << json.dump(-1, ' ', false, Json::error_handler_t::replace);
  }
  // One comparison on "wiki.txt", as `moesaic compare` writes it, less what a report does not read.
  static Json compared(const std::string& hybrid, double fraction, double ratio,
                       const std::string& recipe = "fast") {
    return {{"dense", {{"model", "models/smol.gguf"}, {"perplexity", 20.0}}},
            {"hybrid",
             {{"model", "runs/" + hybrid},
              {"perplexity", 20 * ratio},
              {"active_fraction", fraction},
              {"recipe", recipe}}},
            {"kl_mean", 0.25},
            {"top1_agreement", 0.75},
            {"texts",
             {{{"data", "data/wiki.txt"}, {"active_fraction", fraction}, {"ppl_ratio", ratio}}}}};
  }

  ScratchFolder folder_;
};

TEST_F(Runs, ReportsAndComparisonsComeTogether) {
  Json json = compared("a.gguf", 0.5, 1.25);
  json["texts"][0]["active_fraction"] = 0.46;  // what was measured comes first
  json["texts"].push_back({{"data", "x"}, {"active_fraction", 0.4}, {"ppl_ratio", 1.5}});
  json["texts"].push_back({{"data", "y"}, {"active_fraction", 0.4}, {"ppl_ratio", 1.4}});
  write("any name.compare.json", json);
  write("a.gguf.report.json",
        {{"model", "m/smol.gguf"}, {"recipe", "best"}, {"active_fraction", 0.5}, {"seconds", 600}});
  write("b.gguf.compare.json", compared("b.gguf", 0.4, 1.5));
  write("b.gguf.report.json",
        {{"dense", "m/smol.gguf"}, {"hybrid", "a.gguf"}, {"recovery", {{"seconds", 60}}}});
  write("c.gguf.report.json",
        {{"model", "m/smol.gguf"}, {"recipe", "fast"}, {"active_fraction", 0.3}, {"seconds", 5}});
  write("other.json", Json::array());  // not ours to read
  const std::vector<Found> runs = read_runs(folder_.path);
  ASSERT_EQ(runs.size(), 3U);
  EXPECT_EQ(runs[0].name, "b.gguf");
  EXPECT_EQ(runs[0].recipe, "fast + recover");
  EXPECT_EQ(runs[0].seconds, 60);
  EXPECT_EQ(runs[1].name, "a.gguf");
  EXPECT_EQ(runs[1].source, "any name.compare.json");
  EXPECT_EQ(runs[1].recipe, "best");
  EXPECT_EQ(runs[1].dense, "smol.gguf");
  EXPECT_EQ(runs[1].active_fraction, 0.46);
  EXPECT_EQ(runs[1].seconds, 600);
  ASSERT_TRUE(runs[1].quality);
  EXPECT_EQ(runs[1].quality->text, "wiki.txt");
  EXPECT_DOUBLE_EQ(runs[1].quality->ratio, 1.25);
  EXPECT_EQ(runs[1].quality->ratio_out, 1.5);
  EXPECT_EQ(runs[1].quality->kl, 0.25);
  EXPECT_EQ(runs[1].quality->same_top, 0.75);
  EXPECT_FALSE(runs[0].quality->ratio_out);
  EXPECT_EQ(runs[2].name, "c.gguf");
  EXPECT_FALSE(runs[2].quality);
  EXPECT_FALSE(runs[2].best);
}

// Best: no other run of the group is at the same or a lower fraction and has a lower ratio.
TEST_F(Runs, BestIsWhatNoOtherBetters) {
  std::mt19937_64 rng(5);
  for (int i = 0; i < 60; ++i) {
    Json json = compared(std::to_string(i) + ".gguf", 0.1 * static_cast<double>(1 + rng() % 9),
                         1 + 0.001 * static_cast<double>(rng() % 1000));
    if (i % 3 == 0) json["dense"]["model"] = "gemma.gguf";
    if (i % 5 == 0) json["texts"][0]["data"] = "prose.txt";
    write(std::to_string(i) + ".compare.json", json);
  }
  const std::vector<Found> runs = read_runs(folder_.path);
  ASSERT_EQ(runs.size(), 60U);
  int n_best = 0;
  for (const Found& run : runs) {
    bool bettered = false;
    for (const Found& other : runs) {
      bettered |= other.same_group(run) && other.active_fraction <= run.active_fraction &&
                  other.quality->ratio < run.quality->ratio;
    }
    EXPECT_EQ(run.best, !bettered) << run.name;
    n_best += run.best ? 1 : 0;
  }
  EXPECT_GE(n_best, 4);  // one of each group at least
}

TEST_F(Runs, OldComparisonsWithoutTextsAreRead) {
  Json json = compared("a.gguf", 0.5, 1.25);
  json.erase("texts");
  json["hybrid"].erase("recipe");
  write("a.compare.json", json);
  const std::vector<Found> runs = read_runs(folder_.path);
  ASSERT_EQ(runs.size(), 1U);
  EXPECT_EQ(runs[0].recipe, "?");
  EXPECT_EQ(runs[0].active_fraction, 0.5);
  EXPECT_TRUE(runs[0].best);
}

TEST_F(Runs, FilesThatAreNoneAreNamed) {
  const auto refused = [&](const std::string& part) {
    try {
      read_runs(folder_.path);
      FAIL() << "was read";
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  };
  refused("holds no *.compare.json and no *.report.json");
  write("a.compare.json", Json::array());
  refused("a.compare.json: not a JSON object");
  Json json = compared("a.gguf", 0.5, 1.2);
  json["hybrid"].erase("perplexity");
  write("a.compare.json", json);
  refused("a.compare.json: no /hybrid/perplexity");
  json["hybrid"]["perplexity"] = "much";
  write("a.compare.json", json);
  refused("/hybrid/perplexity is not a number");
  json["texts"] = "none";
  json["hybrid"]["perplexity"] = 24;
  write("a.compare.json", json);
  refused("a.compare.json");
  EXPECT_THROW(read_runs(folder_.path / "nowhere"), IoError);
}

TEST_F(Runs, PageHasAPictureForEveryGroup) {
  write("a.compare.json", compared("a.gguf", 0.5, 1.25));
  write("b.compare.json", compared("b.gguf", 0.35, 1.5, "threshold"));
  write("c.compare.json", compared("c.gguf", 0.6, 1.4));
  Json other = compared("d.gguf", 0.5, 0.98);
  other["dense"]["model"] = "gemma.gguf";
  other["dense"]["perplexity"] = 20.5;
  write("d.compare.json", other);
  const std::string page = runs_page(read_runs(folder_.path));
  EXPECT_EQ(markup_fault(page), "");
  EXPECT_EQ(count(page, "<svg "), 2U);
  EXPECT_EQ(count(page, "<table>"), 2U);
  EXPECT_EQ(count(page, "<circle class=\"point "), 4U);
  EXPECT_EQ(count(page, "<line class=\"front\""), 1U);  // from b to a; c is bettered by a
  EXPECT_NE(page.find("smol.gguf on wiki.txt"), page.npos);
  EXPECT_NE(page.find("b.gguf (threshold): 0.35 of the MLPs active, 1.5 × the dense perplexity"),
            page.npos);
  std::string rest = page;
  const std::string xmlns = "xmlns=\"http://www.w3.org/2000/svg\"";
  for (std::size_t i = rest.find(xmlns); i != rest.npos; i = rest.find(xmlns)) {
    rest.erase(i, xmlns.size());
  }
  for (const char* outside : {"http:", "https:", "//", "<script", "<link", "<img", "url("}) {
    EXPECT_EQ(rest.find(outside), rest.npos) << outside;
  }
}

TEST_F(Runs, PageEscapesNamesAndDrawsNoNaN) {
  Found odd;
  odd.name = "<script>alert('x')</script>.gguf";
  odd.recipe = "\"><b>";
  odd.dense = "a&b\xFF.gguf";
  odd.active_fraction = 0.5;
  odd.quality = Found::Quality{.text = "<i>", .ratio = std::nan(""), .ratio_out = INFINITY};
  Found far = odd;
  far.quality->ratio = std::numeric_limits<double>::infinity();
  Found good = odd;
  good.quality->ratio = 1.3;  // its out-of-domain ratio is infinite all the same
  Found bare;
  bare.name = "bare";
  bare.active_fraction = std::nan("");
  for (const std::vector<Found>& runs :
       {std::vector<Found>{odd, far, good, bare}, {odd}, {bare}, {}}) {
    const std::string page = runs_page(runs);
    EXPECT_EQ(markup_fault(page), "");
    EXPECT_EQ(page.find("<script"), page.npos);
    for (const char* attribute :
         {"x=\"–", "y=\"–", "x1=\"–", "y1=\"–", "y2=\"–", "cy=\"–", "cx=\"–", "nan", "inf\""}) {
      EXPECT_EQ(page.find(attribute), page.npos) << attribute;
    }
  }
}

}  // namespace
}  // namespace moesaic::converter
