#include <fmt/format.h>

#include <algorithm>

#include "converter/report.h"
#include "converter/report_figures.h"
#include "converter/report_page.h"
#include "converter/report_tables.h"
#include "converter/svg.h"

namespace moesaic::converter {
namespace {

bool any_layer(const ConvertReport& report, bool (*is)(const LayerReport&)) {
  return std::any_of(report.layers.begin(), report.layers.end(), is);
}

std::string cards(const ConvertOptions& options, const ConvertReport& report, const Totals& t) {
  const bool routed = any_layer(report, is_self_routed);
  std::string out = "<dl class=\"cards\">\n";
  out += card("Active fraction", percent(report.active_fraction),
              fmt::format("of the dense MLPs' multiply-adds; {} allowed", percent(options.active)));
  out += card("Layers converted", fmt::format("{} of {}", t.converted, report.layers.size()),
              fmt::format("{} stay dense", report.layers.size() - t.converted));
  if (report.recovery) {
    out += card("KL divergence", fixed(report.recovery->kl_packed, 3),
                fmt::format("nats a token, held-out text; {} before recovery",
                            fixed(report.recovery->kl_start, 3)));
  } else if (routed) {
    out += card("Output error", fixed(t.error_closed_form, 3), "mean, calibration tokens");
  } else if (any_layer(report, is_mixture)) {
    out += card("Output error", fixed(t.error_distilled, 3), "mean, held-out tokens");
  } else {
    out += card("Output error", fixed(t.error_distilled, 3),
                fmt::format("mean, held-out tokens; {} before distillation",
                            fixed(t.error_closed_form, 3)));
  }
  out += card(routed ? "Neurons" : "Experts", grouped(t.experts),
              fmt::format("{} never {}", grouped(t.never), routed ? "kept" : "selected"));
  if (routed) {
    out += card("Neurons kept", percent(t.shares.hidden),
                fmt::format("by a token; {} of the inputs", percent(t.shares.input)));
  } else {
    out += card("Router and bypass", percent(t.overhead), "of the dense MLP, in converted layers");
  }
  out += card("Calibration", grouped(report.n_tokens), "tokens");
  out += card("Time", duration(report.seconds), "all runs of this conversion");
  out += card(
      "Peak memory",
      fixed(static_cast<double>(report.peak_memory_bytes) / (1024.0 * 1024 * 1024), 2) + " GiB",
      "resident, while converting");
  return out + "</dl>\n";
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

std::string lead(const ConvertReport& report, const Totals& t) {
  const std::string cost = fmt::format(
      "The MLPs now cost <strong>{}</strong> of the multiply-adds that they cost before",
      percent(report.active_fraction));
  if (any_layer(report, is_self_routed)) {
    const std::string_view how =
        any_layer(report, is_up_by_input)
            ? "of their inputs and their neurons' values, only those above a threshold count"
            : "the gate, on the largest inputs, picks each token's neurons, and of these only "
              "those "
              "with a large product count";
    return fmt::format(
        "{} of {} dense MLPs became self-routed: {}. There is no router besides. {}.", t.converted,
        report.layers.size(), how, cost);
  }
  if (any_layer(report, is_mixture)) {
    return fmt::format(
        "{} of {} dense MLPs became students of the papers, trained from a random start on the "
        "activations of their layer: small experts, of which a router picks a few for each token, "
        "and neurons that always run. {}, router and gate counted.",
        t.converted, report.layers.size(), cost);
  }
  std::int64_t neurons = 1;
  for (const LayerReport& l : report.layers) neurons = std::max(neurons, l.expert_neurons);
  return fmt::format(
      "{} of {} dense MLPs became a secret mixture of experts: {}, of which a low-rank "
      "router picks a few for each token. {}, router and bypass counted.",
      t.converted, report.layers.size(),
      neurons == 1 ? "single neurons"
                   : fmt::format("blocks of {} neurons that fire together", neurons),
      cost);
}

std::string self_routed_sections(const ConvertReport& report) {
  const std::string_view before =
      report.recovery ? " These are from before the recovery, which trains on the whole model's "
                        "output and not on these."
                      : "";
  const bool by_input = any_layer(report, is_up_by_input);
  std::string out = section(
      "Where the budget goes",
      fmt::format(
          "Multiply-adds per token by matrix, as a share of the dense MLP, a third each. Of the "
          "gate those columns are read whose inputs are large, of up {}, of down the columns of "
          "the neurons that are kept.{}",
          by_input ? "the same columns" : "the rows of the neurons that the gate routes",
          has_sensitivities(report)
              ? fmt::format(" The lower panel is predicted from the layer's measured curve{}: a "
                            "budget is well spread where a little more would save every layer "
                            "alike.",
                            report.recovery ? ", before the recovery" : "")
              : ""),
      figure_budget(report));
  out += section(
      "Output error",
      fmt::format(
          "How much of the variance of the dense MLP's output each layer leaves unexplained "
          "on the calibration tokens, its inputs being those that the hybrid gives it.{}",
          before),
      figure_error(report));
  const auto counted = [](const LayerReport& l) { return !l.expert_usage.empty(); };
  if (any_layer(report, counted)) {
    out += section(
        "How often neurons are kept",
        fmt::format("Of all calibration tokens{}. A strip of one even colour means that tokens "
                    "spread over the neurons; a strong left end, neurons that nearly all tokens "
                    "share. Neurons that no token kept could be left out.",
                    report.recovery ? ", in the hybrid as written" : ""),
        figure_usage(report));
  }
  return out;
}

std::string low_rank_sections(const ConvertReport& report) {
  std::string out = section(
      "Output error, before and after distillation",
      "How much of the variance of what each layer is asked to add (the dense MLP's output, "
      "and what earlier layers still owe to the residual stream) it leaves unexplained on "
      "tokens it was not fitted on. Earlier layers' errors cannot be foreseen from a "
      "layer's input, so later layers show more. Rings: the closed-form start from the teacher's "
      "own neurons. Dots: after distilling the layer.",
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
  return out;
}

std::string mixture_sections(const ConvertReport& report) {
  std::string out =
      section("Output error",
              "How much of the variance of the dense MLP's output each student leaves unexplained "
              "on tokens "
              "it was not trained on, its inputs being those that the hybrid gives it.",
              figure_error(report));
  out += section("Where the budget goes",
                 "Multiply-adds per token by part, as a share of the dense MLP.",
                 figure_budget(report));
  out += section(
      "How often experts are used",
      "A strip of one even colour means that the router spreads its choices; a short strong left "
      "end means a few favourites. Experts that no token selected could be left out.",
      figure_usage(report));
  return out;
}

}  // namespace

std::string report_html(const ConvertOptions& options, const ConvertReport& report) {
  const std::string name = escape_html(options.model.filename().string());
  const Totals t = totals_of(report);
  const bool routed = any_layer(report, is_self_routed);
  std::string out;
  if (any_layer(report, is_converted)) {
    out = page_head(name + " as a secret mixture of experts", "moesaic conversion report", name,
                    lead(report, t));
    out += cards(options, report, t);
    if (report.recovery) out += recovery_section(*report.recovery);
    out += routed                          ? self_routed_sections(report)
           : any_layer(report, is_mixture) ? mixture_sections(report)
                                           : low_rank_sections(report);
  } else {
    out = page_head(name + ", all layers dense", "moesaic conversion report", name,
                    "All MLPs stay dense: nothing was saved, and nothing is lost.");
    out += cards(options, report, t);
  }
  out += routed || t.converted == 0 ? self_routed_table(report, t) : low_rank_table(report, t);
  out += provenance(options, report);
  return out + page_end();
}

}  // namespace moesaic::converter
