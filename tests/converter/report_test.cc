#include "converter/report.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "converter/recovery/recover_file.h"
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

// Layer 0 stays dense; the others have experts of two neurons.
ConvertReport student_report() {
  ConvertReport r = some_report();
  for (LayerReport& l : r.layers) {
    if (l.kind == "dense") continue;
    l.kind = "gelu+product_key+softmax";
    l.d_ff = 96;
    l.n_shared = 24;
    l.n_experts = 400;
    l.expert_neurons = 2;
    l.bypass_rank = 0;
    l.active_fraction = 0.6;
    l.error_closed_form = std::numeric_limits<double>::quiet_NaN();
    l.expert_usage.assign(400, 0.06F);
  }
  return r;
}

// Layer 0 stays dense; of the others each neuron is kept by three tokens in ten, two by none.
ConvertReport self_routed_report(int n_layers = 4, const std::string& kind = "glu+gate") {
  ConvertReport r = some_report(n_layers);
  for (LayerReport& l : r.layers) {
    if (l.kind == "dense") continue;
    l.kind = kind;
    l.n_shared = l.n_active = l.router_rank = l.bypass_rank = 0;
    l.shares = {0.6, kind == "glu+gate" ? 0.45 : 1.0, 0.3};
    l.active_fraction = kind == "glu+gate" ? 0.45 : 0.5;
    l.error_closed_form = l.error_distilled = 0.0625;
  }
  return r;
}

RecoveryReport some_recovery() {
  RecoveryReport r;
  r.tokens = 3000000;
  r.kl_start = 0.5;
  r.kl_trained = 0.11;
  r.kl_packed = 0.125;
  r.active_start = 0.36;
  r.active_packed = 0.35;
  r.curve = {{.tokens = 1000000, .kl = 0.4, .held_out = 0.25},
             {.tokens = 2000000, .kl = 0.2, .held_out = 0.15},
             {.tokens = 3000000, .kl = 0.1, .held_out = 0.11}};
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
  for (const char* key : {"layer", "kind", "n_shared", "n_experts", "expert_neurons", "n_active",
                          "router_rank", "bypass_rank", "error_closed_form", "error_distilled",
                          "active_fraction", "sensitivity", "n_never_selected"}) {
    EXPECT_TRUE(json["layers"][1].contains(key)) << key;
  }
  EXPECT_EQ(json["layers"][0]["kind"], "dense");
  EXPECT_EQ(json["layers"][1]["router_rank"], 8);
  EXPECT_EQ(json["layers"][1]["n_never_selected"], 2);
  EXPECT_DOUBLE_EQ(json["layers"][1]["error_distilled"].get<double>(), 0.125);
  EXPECT_DOUBLE_EQ(json["seconds"].get<double>(), 61.5);
}

TEST(ReportJson, SelfRoutedLayersHaveTheirShares) {
  const auto json = nlohmann::json::parse(report_json(some_options(), self_routed_report()));
  const auto& layer = json["layers"][1];
  EXPECT_DOUBLE_EQ(layer["input_share"].get<double>(), 0.6);
  EXPECT_DOUBLE_EQ(layer["gate_share"].get<double>(), 0.45);
  EXPECT_DOUBLE_EQ(layer["hidden_share"].get<double>(), 0.3);
  EXPECT_EQ(layer["n_never_selected"], 2);
  EXPECT_EQ(layer["router_rank"], 0);  // the keys of other kinds stay
  EXPECT_FALSE(json["layers"][0].contains("input_share"));
  const auto low_rank = nlohmann::json::parse(report_json(some_options(), some_report()));
  EXPECT_FALSE(low_rank["layers"][1].contains("input_share"));
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

TEST(ReportHtml, SelfRoutedPageSpeaksOfNoRouter) {
  for (const char* kind : {"glu+gate", "glu+input"}) {
    const std::string html = report_html(some_options(), self_routed_report(4, kind));
    EXPECT_EQ(markup_fault(html), "");
    EXPECT_EQ(count(html, "<svg "), 3U);  // budget, error, usage
    EXPECT_EQ(count(html, "<table>"), 1U);
    for (const char* foreign : {"low-rank router", "bypass rank", "distill", "closed form"}) {
      EXPECT_EQ(html.find(foreign), html.npos) << kind << ": " << foreign;
    }
    EXPECT_NE(html.find("never kept"), html.npos);
    EXPECT_NE(html.find("60.0\u00A0%"), html.npos);  // inputs, in the table
    EXPECT_EQ(html.find("before the recovery"), html.npos);
  }
}

TEST(ReportHtml, StudentsFromARandomStartHaveNoClosedForm) {
  const std::string html = report_html(some_options(), student_report());
  EXPECT_EQ(markup_fault(html), "");
  EXPECT_EQ(count(html, "<svg "), 3U);  // error, budget, usage
  EXPECT_EQ(count(html, "<table>"), 1U);
  EXPECT_NE(html.find("gelu+product_key+softmax"), html.npos);
  EXPECT_NE(html.find("random start"), html.npos);
  EXPECT_EQ(html.find("nan"), html.npos);
  const auto json = nlohmann::json::parse(report_json(some_options(), student_report()));
  EXPECT_TRUE(json["layers"][1]["error_closed_form"].is_null());
  EXPECT_EQ(json["layers"][1]["expert_neurons"], 2);
}

TEST(ReportHtml, RecoveryHasItsFigureAndLabelsWhatIsFromBefore) {
  ConvertReport report = self_routed_report();
  report.recovery = some_recovery();
  const std::string html = report_html(some_options(), report);
  EXPECT_EQ(markup_fault(html), "");
  EXPECT_EQ(count(html, "<svg "), 4U);
  EXPECT_NE(html.find("0.125<small>nats a token, held-out text; 0.500 before recovery"), html.npos);
  EXPECT_NE(html.find("These are from before the recovery"), html.npos);
  EXPECT_NE(html.find("in the hybrid as written"), html.npos);
}

TEST(ReportHtml, AllLayersDenseHaveNoFigures) {
  const std::string html = report_html(some_options(), some_report(1));
  EXPECT_EQ(markup_fault(html), "");
  EXPECT_EQ(count(html, "<svg "), 0U);
  EXPECT_NE(html.find("All MLPs stay dense"), html.npos);
}

TEST(ReportHtml, UsageThatWasNotCountedIsLeftOut) {
  ConvertReport report = self_routed_report();
  for (LayerReport& l : report.layers) l.expert_usage.clear();
  const std::string html = report_html(some_options(), report);
  EXPECT_EQ(count(html, "<svg "), 2U);
  EXPECT_EQ(html.find("fig-usage"), html.npos);
}

TEST(RecoveryHtml, IsWellFormedAndEscapes) {
  RecoverFileOptions options;
  options.dense = "dense<b>.gguf";
  options.hybrid = "<script>.gguf";
  options.output = "out.gguf";
  options.data = "self";
  RecoveryReport recovery = some_recovery();
  const std::string html = recovery_html(options, recovery);
  EXPECT_EQ(markup_fault(html), "");
  EXPECT_EQ(count(html, "<svg "), 1U);
  EXPECT_EQ(html.find("<script"), html.npos);
  EXPECT_NE(html.find("3,000,000"), html.npos);
  recovery.curve.clear();  // nothing was trained
  recovery.kl_start = std::nan("");
  EXPECT_EQ(markup_fault(recovery_html(options, recovery)), "");
}

TEST(FigureRecovery, DrawsBothCurves) {
  const std::string svg = figure_recovery(some_recovery());
  EXPECT_EQ(count(svg, "<line class=\"held-out\""), 3U);  // from before the training on
  EXPECT_EQ(count(svg, "<line class=\"training\""), 2U);
  EXPECT_NE(svg.find("0 tokens: held-out KL 0.5<"), svg.npos);
  EXPECT_NE(svg.find("3 M tokens: training KL 0.1<"), svg.npos);
  RecoveryReport broken = some_recovery();
  broken.curve[1].held_out = std::numeric_limits<double>::infinity();
  EXPECT_EQ(count(figure_recovery(broken), "<line class=\"held-out\""), 2U);
}

TEST(FigureBudget, LowerPanelOnlyWhereSensitivitiesAreKnown) {
  ConvertReport report = self_routed_report();
  EXPECT_NE(figure_budget(report).find("KL, nats"), std::string::npos);
  for (LayerReport& l : report.layers) l.sensitivity = 0;
  EXPECT_EQ(figure_budget(report).find("KL, nats"), std::string::npos);
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
  EXPECT_NE(svg.find("layer 1: 2 of 80 experts (2.5 %) selected by no token<"), svg.npos);
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

// A student of two rows a neuron and more experts than the dense MLP has neurons.
TEST(BudgetParts, OfAStudentSumToItsActiveFraction) {
  const LayerReport l = student_report().layers[1];
  const BudgetParts parts = budget_parts(l);
  EXPECT_NEAR(parts.shared, 2.0 / 3 * 24 / 96, 1e-12);
  EXPECT_NEAR(parts.selected, 2.0 / 3 * 24 * 2 / 96, 1e-12);
  EXPECT_EQ(parts.bypass, 0);
  EXPECT_NEAR(parts.shared + parts.selected + parts.router, l.active_fraction, 1e-12);
}

TEST(RoutedParts, SumToTheActiveFraction) {
  for (const char* kind : {"glu+gate", "glu+input"}) {
    const LayerReport l = self_routed_report(2, kind).layers[1];
    const RoutedParts parts = routed_parts(l);
    EXPECT_NEAR(parts.gate, 0.2, 1e-12);
    EXPECT_NEAR(parts.down, 0.1, 1e-12);
    EXPECT_NEAR(parts.gate + parts.up + parts.down, l.active_fraction, 1e-12);
    EXPECT_EQ(budget_parts(l).router, 0);
  }
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
