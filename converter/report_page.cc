#include "converter/report_page.h"

#include <fmt/format.h>

#include <cmath>

#include "converter/report_figures.h"
#include "converter/report_style.h"
#include "converter/svg.h"

namespace moesaic::converter {

std::string percent(double fraction, int decimals) {
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

// 12345678 → "12,345,678".
std::string grouped(std::int64_t n) {
  std::string s = std::to_string(n);
  for (auto i = static_cast<std::int64_t>(s.size()) - 3; i > (n < 0 ? 1 : 0); i -= 3) {
    s.insert(static_cast<std::size_t>(i), ",");
  }
  return s;
}

std::string page_head(std::string_view title, std::string_view kicker, std::string_view heading,
                      std::string_view lead) {
  return fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n"
      "<title>{}</title>\n<style>{}</style>\n</head>\n<body>\n<main>\n<header>\n"
      "<p class=\"kicker\">{}</p>\n<h1>{}</h1>\n<p class=\"lead\">{}</p>\n</header>\n",
      title, report_style(), kicker, heading, lead);
}

std::string page_end() { return "</main>\n</body>\n</html>\n"; }

std::string card(std::string_view label, std::string_view value, std::string_view note) {
  return fmt::format("<div><dt>{}</dt><dd>{}<small>{}</small></dd></div>\n", label, value, note);
}

std::string section(std::string_view heading, std::string_view text, std::string_view svg) {
  return fmt::format(
      "<section class=\"picture\">\n<h2>{}</h2>\n<p>{}</p>\n<figure>\n{}</figure>\n</section>\n",
      heading, text, svg);
}

std::string recovery_section(const RecoveryReport& recovery) {
  return section(
      "Recovery",
      fmt::format("Converted layers trained end to end towards the dense model: the KL divergence "
                  "between their next tokens on held-out text went from {} to {} nats a token in "
                  "float32, was {} when rounded to the formats of the file, and is {} as written, "
                  "the scales of its blocks tuned. The MLPs' share of the dense "
                  "multiply-adds there was {} before and is {} as written.",
                  fixed(recovery.kl_start, 4), fixed(recovery.kl_trained, 4),
                  fixed(recovery.kl_rounded, 4), fixed(recovery.kl_packed, 4),
                  percent(recovery.active_start), percent(recovery.active_packed)),
      figure_recovery(recovery));
}

std::string fact(std::string_view name, std::string_view value, bool code) {
  const std::string text = escape_html(value);
  return fmt::format("<dt>{}</dt><dd>{}</dd>\n", name, code ? "<code>" + text + "</code>" : text);
}

}  // namespace moesaic::converter
