#include "converter/report_tables.h"

#include <fmt/format.h>

#include "converter/report_figures.h"
#include "converter/report_page.h"
#include "converter/svg.h"

namespace moesaic::converter {

Totals totals_of(const ConvertReport& report) {
  Totals t;
  t.shares = {0, 0, 0};
  for (const LayerReport& l : report.layers) {
    if (!is_converted(l)) continue;
    ++t.converted;
    t.error_closed_form += l.error_closed_form;
    t.error_distilled += l.error_distilled;
    t.experts += l.n_experts;
    t.never += never_selected(l);
    const BudgetParts parts = budget_parts(l);
    t.overhead += parts.router + parts.bypass;
    t.shares.input += l.shares.input;
    t.shares.gate += l.shares.gate;
    t.shares.hidden += l.shares.hidden;
  }
  const auto n = static_cast<double>(t.converted);  // 0/0: NaN, shown as a dash
  t.error_closed_form /= n;
  t.error_distilled /= n;
  t.overhead /= n;
  t.shares = {t.shares.input / n, t.shares.gate / n, t.shares.hidden / n};
  return t;
}

std::string low_rank_table(const ConvertReport& report, const Totals& t) {
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
          l.layer, escape_html(l.kind), l.n_shared,
          l.expert_neurons == 1 ? std::to_string(l.n_experts)
                                : fmt::format("{} × {}", l.n_experts, l.expert_neurons),
          l.n_active, l.router_rank, l.bypass_rank, percent(l.active_fraction),
          fixed(l.sensitivity, 4), fixed(l.error_closed_form, 4), fixed(l.error_distilled, 4),
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

std::string self_routed_table(const ConvertReport& report, const Totals& t) {
  std::string out = fmt::format(
      "<section>\n<h2>All layers</h2>\n<p>The numbers behind the pictures. Inputs, routed, kept: "
      "mean shares of the inputs that the gate reads, of the neurons that the gate's value lets "
      "through, and of those whose product is kept. Error: ω-weighted error over ω-weighted "
      "variance of the MLP's output, on calibration tokens. Predicted KL: divergence from the "
      "dense model in nats with this layer alone converted, from its curve.{}</p>\n"
      "<div class=\"scroll\"><table>\n<thead><tr><th>layer</th><th>kind</th><th>neurons</th>"
      "<th>inputs</th><th>routed</th><th>kept</th><th>active fraction</th><th>predicted KL</th>"
      "<th>error</th><th>never kept</th></tr></thead>\n<tbody>\n",
      report.recovery ? " Error and predicted KL are from before the recovery, all else is of what "
                        "was written."
                      : "");
  for (const LayerReport& l : report.layers) {
    if (is_self_routed(l)) {
      out += fmt::format(
          "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td>"
          "<td>{}</td><td>{}</td><td>{}</td></tr>\n",
          l.layer, escape_html(l.kind), l.n_experts, percent(l.shares.input),
          is_up_by_input(l) ? "–" : percent(l.shares.gate), percent(l.shares.hidden),
          percent(l.active_fraction), has_sensitivities(report) ? fixed(l.sensitivity, 4) : "–",
          fixed(l.error_closed_form, 4),
          l.expert_usage.empty() ? "–" : std::to_string(never_selected(l)));
    } else {
      out += fmt::format(
          "<tr class=\"stays\"><td>{}</td><td>{}</td><td>–</td><td>–</td><td>–</td><td>–</td>"
          "<td>{}</td><td>–</td><td>–</td><td>–</td></tr>\n",
          l.layer, escape_html(l.kind), percent(l.active_fraction));
    }
  }
  out += fmt::format(
      "</tbody>\n<tfoot><tr><td></td><td>mean, sum</td><td>{}</td><td>{}</td><td></td><td>{}</td>"
      "<td>{}</td><td></td><td>{}</td><td>{}</td></tr></tfoot>\n</table></div>\n</section>\n",
      t.experts, percent(t.shares.input), percent(t.shares.hidden), percent(report.active_fraction),
      fixed(t.error_closed_form, 4), t.never);
  return out;
}

}  // namespace moesaic::converter
