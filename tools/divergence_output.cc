#include "tools/divergence_output.h"

#include <fmt/format.h>

#include <array>
#include <utility>

namespace moesaic::tools {
namespace {

using models::Estimate;
using models::Quantiles;

struct QuantileName {
  double Quantiles::*value;
  const char* key;
  const char* label;
};
constexpr std::array<QuantileName, 13> kQuantiles = {{{&Quantiles::max, "max", "Maximum"},
                                                      {&Quantiles::p99_9, "p99_9", "99.9%"},
                                                      {&Quantiles::p99, "p99", "99.0%"},
                                                      {&Quantiles::p95, "p95", "95.0%"},
                                                      {&Quantiles::p90, "p90", "90.0%"},
                                                      {&Quantiles::p75, "p75", "75.0%"},
                                                      {&Quantiles::median, "median", "Median"},
                                                      {&Quantiles::p25, "p25", "25.0%"},
                                                      {&Quantiles::p10, "p10", "10.0%"},
                                                      {&Quantiles::p5, "p5", "5.0%"},
                                                      {&Quantiles::p1, "p1", "1.0%"},
                                                      {&Quantiles::p0_1, "p0_1", "0.1%"},
                                                      {&Quantiles::min, "min", "Minimum"}}};

void add_quantiles(Json& object, const Quantiles& quantiles) {
  for (const QuantileName& q : kQuantiles) object[q.key] = quantiles.*q.value;
}

std::string cell(const Estimate& e, int decimals, double unit = 1) {
  return fmt::format("{:.{}f} ± {:.{}f}", unit * e.value, decimals, unit * e.stderror, decimals);
}

constexpr double kPercent = 100;

}  // namespace

Json divergence_json(const models::DivergenceStatistics& s) {
  Json kl = {{"mean", s.kl.value}, {"stderr", s.kl.stderror}};
  add_quantiles(kl, s.kl_quantiles);
  Json delta_p = {{"mean", s.delta_p.value},
                  {"stderr", s.delta_p.stderror},
                  {"rms", s.rms_delta_p.value},
                  {"rms_stderr", s.rms_delta_p.stderror}};
  add_quantiles(delta_p, s.delta_p_quantiles);
  return {{"ln_ppl_correlation", s.ln_perplexity_correlation},
          {"ln_ppl_ratio", s.ln_perplexity_ratio.value},
          {"ln_ppl_ratio_stderr", s.ln_perplexity_ratio.stderror},
          {"ppl_ratio", s.perplexity_ratio.value},
          {"ppl_ratio_stderr", s.perplexity_ratio.stderror},
          {"ppl_difference", s.perplexity_difference.value},
          {"ppl_difference_stderr", s.perplexity_difference.stderror},
          {"kl", std::move(kl)},
          {"delta_p", std::move(delta_p)},
          {"same_top_p", s.same_top.value},
          {"same_top_p_stderr", s.same_top.stderror}};
}

std::string divergence_tables(const models::DivergenceStatistics& s) {
  const std::string perplexities =
      markdown_table({{"Q: hybrid, base: dense", "value"},
                      {"Mean PPL(Q)", cell(s.perplexity_q, 4)},
                      {"Mean PPL(base)", cell(s.perplexity_base, 4)},
                      {"Cor(ln(PPL(Q)), ln(PPL(base)))",
                       fmt::format("{:.2f} %", kPercent * s.ln_perplexity_correlation)},
                      {"Mean ln(PPL(Q)/PPL(base))", cell(s.ln_perplexity_ratio, 5)},
                      {"Mean PPL(Q)/PPL(base)", cell(s.perplexity_ratio, 5)},
                      {"Mean PPL(Q)-PPL(base)", cell(s.perplexity_difference, 4)},
                      {"Same top p", cell(s.same_top, 3, kPercent) + " %"}});
  std::vector<std::vector<std::string>> rows = {
      {"", "KLD (nats)", "Δp (%)"},
      {"Mean", cell(s.kl, 6), cell(s.delta_p, 3, kPercent)},
      {"RMS", "", cell(s.rms_delta_p, 3, kPercent)}};
  for (const QuantileName& q : kQuantiles) {
    rows.push_back({q.label, fmt::format("{:.6f}", s.kl_quantiles.*q.value),
                    fmt::format("{:.3f}", kPercent * (s.delta_p_quantiles.*q.value))});
  }
  return perplexities + "\n" + markdown_table(rows);
}

}  // namespace moesaic::tools
