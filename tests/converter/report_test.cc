#include "converter/report.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "converter/report_figures.h"
#include "converter/svg.h"
#include "tests/converter/markup.h"

namespace moesaic::converter {
namespace {

ConvertOptions some_options() {
  ConvertOptions o;
  o.model = "models/smol.gguf";
  o.output = "out/hybrid.gguf";
  o.data = "text.txt";
  return o;
}

ConvertReport some_report(int n_layers = 4) {
  ConvertReport r;
  r.seconds = 61.5;
  r.peak_memory_bytes = std::int64_t{3} << 30;
  r.active_fraction = 0.4375;
  r.n_tokens = 65536;
  r.source_digest = std::string(64, 'a');
  r.data_digest = std::string(64, 'b');
  for (int i = 0; i < n_layers; ++i) {
    LayerReport l;
    l.layer = i;
    l.sensitivity = 0.01 * i - 0.002;
    if (i == 0) {
      l.kind = "dense";
    } else {
      l.kind = "glu+low_rank";
      l.n_shared = 16;
      l.n_experts = 80;
      l.n_active = 24;
      l.router_rank = 8;
      l.bypass_rank = 4;
      l.active_fraction = 0.5;
      l.error_closed_form = 0.2;
      l.error_distilled = 0.125;
      l.expert_usage.assign(80, 0.3F);
      l.expert_usage[0] = l.expert_usage[1] = 0;
    }
    r.layers.push_back(std::move(l));
  }
  return r;
}

TEST(ReportJson, HasTheDocumentedKeys) {
  const auto json = nlohmann::json::parse(report_json(some_options(), some_report()));
  for (const char* key :
       {"seconds", "peak_memory_bytes", "active_fraction", "layers", "model", "output", "data",
        "recipe", "seed", "n_tokens", "source_digest", "data_digest"}) {
    EXPECT_TRUE(json.contains(key)) << key;
  }
  ASSERT_EQ(json["layers"].size(), 4U);
  for (const char* key : {"layer", "kind", "n_shared", "n_experts", "n_active", "router_rank",
                          "bypass_rank", "error_closed_form", "error_distilled", "active_fraction",
                          "sensitivity", "n_never_selected"}) {
    EXPECT_TRUE(json["layers"][1].contains(key)) << key;
  }
  EXPECT_EQ(json["layers"][0]["kind"], "dense");
  EXPECT_EQ(json["layers"][1]["router_rank"], 8);
  EXPECT_EQ(json["layers"][1]["n_never_selected"], 2);
  EXPECT_DOUBLE_EQ(json["layers"][1]["error_distilled"].get<double>(), 0.125);
  EXPECT_DOUBLE_EQ(json["seconds"].get<double>(), 61.5);
}

TEST(ReportJson, NotANumberAndInfinityBecomeNull) {
  ConvertReport report = some_report();
  report.layers[1].error_closed_form = std::nan("");
  report.layers[2].sensitivity = std::numeric_limits<double>::infinity();
  const auto json = nlohmann::json::parse(report_json(some_options(), report));
  EXPECT_TRUE(json["layers"][1]["error_closed_form"].is_null());
  EXPECT_TRUE(json["layers"][2]["sensitivity"].is_null());
}

TEST(ReportJson, PathThatIsNotUtf8StillParses) {
  ConvertOptions options = some_options();
  options.model = "dir/\xFF\xFEname.gguf";
  EXPECT_TRUE(nlohmann::json::accept(report_json(options, some_report())));
}

TEST(ReportHtml, IsWellFormedAndHasFourFiguresAndOneTable) {
  const std::string html = report_html(some_options(), some_report());
  EXPECT_EQ(markup_fault(html), "");
  EXPECT_EQ(count(html, "<svg "), 4U);
  EXPECT_EQ(count(html, "<table>"), 1U);
  EXPECT_EQ(count(html, "<desc "), 4U);
  EXPECT_EQ(count(html, "role=\"img\""), 4U);
}

TEST(ReportHtml, TakesNothingFromOutside) {
  std::string html = report_html(some_options(), some_report());
  const std::string xmlns = "xmlns=\"http://www.w3.org/2000/svg\"";  // a name, fetched by nobody
  for (std::size_t i = html.find(xmlns); i != html.npos; i = html.find(xmlns)) {
    html.erase(i, xmlns.size());
  }
  for (const char* forbidden :
       {"http:", "https:", "//", "<script", "<link", "<img", "@import", "url(", "<iframe"}) {
    EXPECT_EQ(html.find(forbidden), html.npos) << forbidden;
  }
}

TEST(ReportHtml, EscapesHostileNames) {
  ConvertOptions options = some_options();
  options.model = "dir/<script>alert('x')<\\/script>&\"\xC3\x28\x01.gguf";
  options.data = "\"><img src=x onerror=alert(1)>";
  options.recipe = "<b>";
  ConvertReport report = some_report();
  report.layers[1].kind = "</table><script>";
  report.source_digest = "&lt;";
  const std::string html = report_html(options, report);
  EXPECT_EQ(markup_fault(html), "");
  EXPECT_EQ(html.find("<script"), html.npos);
  EXPECT_EQ(html.find("<img"), html.npos);
  EXPECT_NE(html.find("&lt;script&gt;alert(&#39;x&#39;)"), html.npos);
  EXPECT_NE(html.find("\xEF\xBF\xBD("), html.npos);  // the broken byte, replaced
  EXPECT_EQ(html.find('\x01'), html.npos);
}

TEST(ReportHtml, NoLayersOneLayerManyLayers) {
  for (const int n : {0, 1, 2, 126}) {
    const std::string html = report_html(some_options(), some_report(n));
    EXPECT_EQ(markup_fault(html), "") << n;
    EXPECT_EQ(html.find("nan"), html.npos) << n;
    EXPECT_EQ(html.find("inf\""), html.npos) << n;
  }
}

TEST(ReportHtml, NotANumberLeavesNoCoordinate) {
  ConvertReport report = some_report();
  report.layers[1].error_closed_form = std::nan("");
  report.layers[2].error_distilled = std::numeric_limits<double>::infinity();
  report.layers[3].sensitivity = -std::numeric_limits<double>::infinity();
  report.active_fraction = std::nan("");
  const std::string html = report_html(some_options(), report);
  EXPECT_EQ(markup_fault(html), "");
  for (const char* attribute : {"x=\"–", "y=\"–", "y1=\"–", "y2=\"–", "cy=\"–", "height=\"–"}) {
    EXPECT_EQ(html.find(attribute), html.npos) << attribute;
  }
}

TEST(ReportHtml, UsageStripCountsExperts) {
  const std::string svg = figure_usage(some_report(2));
  EXPECT_NE(svg.find("layer 1: 78 of 80 experts (97.5 %) selected by 25–50 % of tokens"), svg.npos);
  EXPECT_NE(svg.find("layer 1: 2 of 80 experts (2.5 %) never selected<"), svg.npos);
  EXPECT_NE(svg.find("2 of 80</text>"), svg.npos);
}

TEST(BudgetParts, SumToTheActiveFraction) {
  // d_model 576, d_ff 1536, counted by hand as multiply-adds.
  LayerReport l;
  l.kind = "glu+low_rank";
  l.n_shared = 128;
  l.n_experts = 1408;
  l.n_active = 256;
  l.router_rank = 64;
  l.bypass_rank = 32;
  const double dense = 3.0 * 576 * 1536;
  const double router = 64.0 * (576 + 1408) / dense;
  const double bypass = 2.0 * 32 * 576 / dense;
  l.active_fraction = 3.0 * 576 * (128 + 256) / dense + router + bypass;
  const BudgetParts parts = budget_parts(l);
  EXPECT_NEAR(parts.shared, 128.0 / 1536, 1e-12);
  EXPECT_NEAR(parts.selected, 256.0 / 1536, 1e-12);
  EXPECT_NEAR(parts.router, router, 1e-12);
  EXPECT_NEAR(parts.bypass, bypass, 1e-12);
}

TEST(NiceTicks, EndAtOrAboveTheLargestValue) {
  EXPECT_EQ(nice_ticks(1.0, 4), (std::vector<double>{0, 0.25, 0.5, 0.75, 1.0}));
  EXPECT_EQ(nice_ticks(7, 4), (std::vector<double>{0, 2, 4, 6, 8}));
  for (const double max : {1e-9, 0.031, 0.3, 1.01, 99.0, 1e12}) {
    const std::vector<double> ticks = nice_ticks(max, 5);
    EXPECT_GE(ticks.back(), max * (1 - 1e-9));
    EXPECT_LE(ticks.size(), 8U);
  }
}

TEST(NiceTicks, NoUsableMaximum) {
  for (const double max : {0.0, -1.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
    EXPECT_EQ(nice_ticks(max, 4).back(), 1.0);
  }
}

}  // namespace
}  // namespace moesaic::converter
