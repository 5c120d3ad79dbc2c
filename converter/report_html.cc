#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "converter/report.h"
#include "converter/report_figures.h"
#include "converter/report_style.h"
#include "converter/svg.h"

namespace moesaic::converter {
namespace {

constexpr std::string_view kStyle = R"css(
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f5f7fa; --ink: #18212c; --muted: #566373; --rule: #dde3ea;
  --accent: #0b6e69; --ring: #8592a3; --dense: #ccd3dc;
  --shared: #1d4f91; --selected: #78aee0; --router: #dd8a2e; --bypass: #8d68bd; --rise: #b4475d;
  --u6: #0f3460; --u5: #1f5f9e; --u4: #4189cb; --u3: #82b5e3; --u2: #b9d7f1; --u1: #dfecf8;
  --u0: #d9622b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #11161d; --panel: #1a212b; --ink: #e4e9ef; --muted: #98a5b5; --rule: #2b3541;
    --accent: #3fcabd; --ring: #8592a3; --dense: #3d4855;
    --shared: #5b9bea; --selected: #2f5f96; --router: #efa150; --bypass: #b193dd; --rise: #e0788c;
    --u6: #d3e8fd; --u5: #9fcbf5; --u4: #639fdc; --u3: #3a73b1; --u2: #254c7b; --u1: #1d3450;
    --u0: #ec7a41;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
.kicker { margin: 0; color: var(--accent); font-size: .8rem; font-weight: 600; letter-spacing: .08em;
  text-transform: uppercase; }
h1 { margin: .2rem 0 .6rem; font-size: clamp(1.5rem, 4.5vw, 2.2rem); line-height: 1.2;
  overflow-wrap: anywhere; }
.lead { max-width: 46rem; margin: 0 0 1.8rem; font-size: 1.08rem; color: var(--muted); }
.lead strong { color: var(--ink); }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: .8rem;
  margin: 0 0 2.6rem; padding: 0; }
.cards div { padding: .85rem 1rem; background: var(--panel); border-radius: .6rem; }
.cards dt { color: var(--muted); font-size: .82rem; }
.cards dd { margin: .1rem 0 0; font-size: 1.4rem; font-weight: 650; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.cards small { display: block; color: var(--muted); font-size: .78rem; font-weight: 400; }
section { margin: 0 0 3rem; }
h2 { margin: 0 0 .3rem; font-size: 1.22rem; line-height: 1.3; }
section p { max-width: 46rem; margin: 0 0 1rem; color: var(--muted); }
figure { margin: 0; padding: .9rem .6rem .5rem; border: 1px solid var(--rule); border-radius: .6rem;
  overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 42rem; height: auto; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif;
  fill: var(--muted); font-variant-numeric: tabular-nums; }
svg .legend, svg .panel-title { fill: var(--ink); }
svg .panel-title { font-weight: 600; }
svg .mid { text-anchor: middle; } svg .end { text-anchor: end; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--ring); }
svg .mean { stroke: var(--ink); stroke-dasharray: 5 4; }
svg .stem { stroke: var(--ring); stroke-width: 1.5; }
svg .before { fill: var(--paper); stroke: var(--ring); stroke-width: 2; }
svg .after { fill: var(--accent); stroke: var(--paper); }
svg .dense { fill: var(--dense); } svg .shared { fill: var(--shared); }
svg .selected { fill: var(--selected); } svg .router { fill: var(--router); }
svg .bypass { fill: var(--bypass); } svg .rise { fill: var(--rise); }
svg .u6 { fill: var(--u6); } svg .u5 { fill: var(--u5); } svg .u4 { fill: var(--u4); }
svg .u3 { fill: var(--u3); } svg .u2 { fill: var(--u2); } svg .u1 { fill: var(--u1); }
svg .u0 { fill: var(--u0); }
svg rect:hover, svg circle:hover { opacity: .75; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: .6rem; }
table { width: 100%; border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .55rem; text-align: right; white-space: nowrap; }
th { white-space: normal; line-height: 1.25; background: var(--panel); color: var(--muted); font-weight: 600; vertical-align: bottom; }
td { border-top: 1px solid var(--rule); }
th:nth-child(2), td:nth-child(2) { text-align: left; }
tr.stays td { color: var(--muted); }
tfoot td { border-top: 2px solid var(--rule); font-weight: 600; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: 0;
  font-size: .9rem; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
code { font: .92em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (max-width: 46rem) { .cards { grid-template-columns: 1fr 1fr; } }
@media (max-width: 34rem) {
  main { padding: 1.5rem 1rem 3rem; }
  .cards div { padding: .7rem .8rem; }
  .cards dd { font-size: 1.2rem; }
  .facts { grid-template-columns: 1fr; gap: 0; }
  .facts dd { margin-bottom: .5rem; }
}
@media print {
  :root { color-scheme: light; --paper: #ffffff; --panel: #f5f7fa; --ink: #18212c; --muted: #444f5c;
    --rule: #cfd6de; --accent: #0b6e69; --dense: #ccd3dc; --shared: #1d4f91; --selected: #78aee0;
    --router: #dd8a2e; --bypass: #8d68bd; --rise: #b4475d; --u6: #0f3460; --u5: #1f5f9e;
    --u4: #4189cb; --u3: #82b5e3; --u2: #b9d7f1; --u1: #dfecf8; --u0: #d9622b; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  .cards div, figure, tr { break-inside: avoid; }
  .cards dd { font-size: 1.1rem; }
  .picture { break-inside: avoid; }
  tfoot { display: table-row-group; }
  figure, .scroll { overflow: visible; }
  figure svg { min-width: 0; }
  table { font-size: 7.5pt; }
  th, td { padding: .2rem .35rem; }
}
)css";

std::string percent(double fraction, int decimals = 1) {
  return std::isfinite(fraction) ? fmt::format("{:.{}f}\u00A0%", 100 * fraction, decimals) : "–";
}

std::string fixed(double value, int decimals) {
  return std::isfinite(value) ? fmt::format("{:.{}f}", value, decimals) : "–";
}

std::string duration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "–";
  const auto s = static_cast<std::int64_t>(std::llround(seconds));
  if (s < 60) return fmt::format("{} s", s);
  if (s < 3600) return fmt::format("{} min {} s", s / 60, s % 60);
  return fmt::format("{} h {} min", s / 3600, s / 60 % 60);
}

/// 12345678 → "12,345,678".
std::string grouped(std::int64_t n) {
  std::string s = std::to_string(n);
  for (auto i = static_cast<std::int64_t>(s.size()) - 3; i > (n < 0 ? 1 : 0); i -= 3) {
    s.insert(static_cast<std::size_t>(i), ",");
  }
  return s;
}

/// What the cards and the table's last row say about all converted layers together.
struct Totals {
  std::size_t converted = 0;
  double error_closed_form = 0, error_distilled = 0;  // means
  std::int64_t experts = 0, never = 0;
  double overhead = 0;  // router and bypass over the dense MLP, mean
};

Totals totals_of(const ConvertReport& report) {
  Totals t;
  for (const LayerReport& l : report.layers) {
    if (!is_converted(l)) continue;
    ++t.converted;
    t.error_closed_form += l.error_closed_form;
    t.error_distilled += l.error_distilled;
    t.experts += l.n_experts;
    t.never += never_selected(l);
    const BudgetParts parts = budget_parts(l);
    t.overhead += parts.router + parts.bypass;
  }
  const auto n = static_cast<double>(t.converted);  // 0/0: NaN, shown as a dash
  t.error_closed_form /= n;
  t.error_distilled /= n;
  t.overhead /= n;
  return t;
}

std::string card(std::string_view label, std::string_view value, std::string_view note) {
  return fmt::format("<div><dt>{}</dt><dd>{}<small>{}</small></dd></div>\n", label, value, note);
}

std::string cards(const ConvertOptions& options, const ConvertReport& report, const Totals& t) {
  std::string out = "<dl class=\"cards\">\n";
  out += card("Active fraction", percent(report.active_fraction),
              fmt::format("of the dense MLPs' multiply-adds; {} allowed", percent(options.active)));
  out += card("Layers converted", fmt::format("{} of {}", t.converted, report.layers.size()),
              fmt::format("{} stay dense", report.layers.size() - t.converted));
  out += card(
      "Output error", fixed(t.error_distilled, 3),
      fmt::format("mean, held-out tokens; {} before distillation", fixed(t.error_closed_form, 3)));
  out += card("Experts", grouped(t.experts), fmt::format("{} never selected", grouped(t.never)));
  out += card("Router and bypass", percent(t.overhead), "of the dense MLP, in converted layers");
  out += card("Calibration", grouped(report.n_tokens), "tokens");
  out += card("Time", duration(report.seconds), "all runs of this conversion");
  out += card(
      "Peak memory",
      fixed(static_cast<double>(report.peak_memory_bytes) / (1024.0 * 1024 * 1024), 2) + " GiB",
      "resident, while converting");
  return out + "</dl>\n";
}

std::string section(std::string_view heading, std::string_view text, std::string_view svg) {
  return fmt::format(
      "<section class=\"picture\">\n<h2>{}</h2>\n<p>{}</p>\n<figure>\n{}</figure>\n</section>\n",
      heading, text, svg);
}

std::string table(const ConvertReport& report, const Totals& t) {
  std::string out =
      "<section>\n<h2>All layers</h2>\n<p>The numbers behind the pictures. Error: ω-weighted "
      "error over ω-weighted variance of what the layer is asked to add, on held-out tokens. "
      "Sensitivity: KL divergence from the dense model in nats with this layer alone "
      "converted.</p>\n"
      "<div class=\"scroll\"><table>\n<thead><tr><th>layer</th><th>kind</th><th>shared</th>"
      "<th>experts</th><th>active</th><th>router rank</th><th>bypass rank</th>"
      "<th>active fraction</th><th>sensitivity</th><th>closed form</th><th>distilled</th>"
      "<th>never selected</th></tr></thead>\n<tbody>\n";
  for (const LayerReport& l : report.layers) {
    if (is_converted(l)) {
      out += fmt::format(
          "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td>"
          "<td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>\n",
          l.layer, escape_html(l.kind), l.n_shared, l.n_experts, l.n_active, l.router_rank,
          l.bypass_rank, percent(l.active_fraction), fixed(l.sensitivity, 4),
          fixed(l.error_closed_form, 4), fixed(l.error_distilled, 4),
          l.expert_usage.empty() ? "–" : std::to_string(never_selected(l)));
    } else {
      out += fmt::format(
          "<tr class=\"stays\"><td>{}</td><td>dense</td><td>–</td><td>–</td><td>–</td><td>–</td>"
          "<td>–</td><td>{}</td><td>{}</td><td>–</td><td>–</td><td>–</td></tr>\n",
          l.layer, percent(l.active_fraction), fixed(l.sensitivity, 4));
    }
  }
  out += fmt::format(
      "</tbody>\n<tfoot><tr><td></td><td>mean, sum</td><td></td><td>{}</td><td></td><td></td>"
      "<td></td><td>{}</td><td></td><td>{}</td><td>{}</td><td>{}</td></tr></tfoot>\n"
      "</table></div>\n</section>\n",
      t.experts, percent(report.active_fraction), fixed(t.error_closed_form, 4),
      fixed(t.error_distilled, 4), t.never);
  return out;
}

std::string fact(std::string_view name, std::string_view value, bool code = true) {
  const std::string text = escape_html(value);
  return fmt::format("<dt>{}</dt><dd>{}</dd>\n", name, code ? "<code>" + text + "</code>" : text);
}

std::string provenance(const ConvertOptions& options, const ConvertReport& report) {
  const std::string data =
      options.data == "self" ? "self (text sampled by the model itself)" : options.data;
  return "<section>\n<h2>Where it comes from</h2>\n<dl class=\"facts\">\n" +
         fact("checkpoint", options.model.string()) + fact("SHA-256", report.source_digest) +
         fact("hybrid", options.output.string()) + fact("calibration text", data) +
         fact("SHA-256 of its ids", report.data_digest) +
         fact("recipe", fmt::format("{}, seed {}, --active {}", options.recipe, options.seed,
                                    number(options.active, 4))) +
         "</dl>\n</section>\n";
}

}  // namespace

std::string_view report_style() { return kStyle; }

std::string report_html(const ConvertOptions& options, const ConvertReport& report) {
  const std::string name = escape_html(options.model.filename().string());
  const Totals t = totals_of(report);
  std::string out = fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n"
      "<title>{} as a secret mixture of experts</title>\n<style>{}</style>\n</head>\n<body>\n"
      "<main>\n<header>\n<p class=\"kicker\">moesaic conversion report</p>\n<h1>{}</h1>\n"
      "<p class=\"lead\">{} of {} dense MLPs became a secret mixture of experts: single neurons, "
      "of "
      "which a low-rank router picks a few for each token. The MLPs now cost <strong>{}</strong> "
      "of "
      "the multiply-adds that they cost before, router and bypass counted.</p>\n</header>\n",
      name, kStyle, name, t.converted, report.layers.size(), percent(report.active_fraction));
  out += cards(options, report, t);
  out += section(
      "Output error, before and after distillation",
      "How much of the variance of what each layer is asked to add (the dense MLP's output, "
      "and what earlier layers still owe to the residual stream) it leaves unexplained on "
      "tokens it was not fitted on. Earlier layers' errors cannot be foreseen from a "
      "layer's input, so later layers show more. Rings: the closed-form start from the teacher's "
      "own "
      "neurons. Dots: after distilling the layer.",
      figure_error(report));
  out +=
      section("Where the budget goes",
              "Multiply-adds per token by part, as a share of the dense MLP. Layers that hurt the "
              "model more when converted (lower panel) should keep more.",
              figure_budget(report));
  out += section(
      "How often experts are used",
      "A strip of one even colour means that the router spreads its choices; a short strong left "
      "end means a few favourites. Experts that no token selected could be left out.",
      figure_usage(report));
  out +=
      section("Rank of router and bypass",
              "The router scores all experts through a bottleneck of rank r; the bypass, a linear "
              "map of rank q, stands in for the experts that were not selected.",
              figure_ranks(report));
  out += table(report, t);
  out += provenance(options, report);
  return out + "</main>\n</body>\n</html>\n";
}

}  // namespace moesaic::converter
