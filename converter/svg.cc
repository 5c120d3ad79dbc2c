#include "converter/svg.h"

#include <fmt/format.h>

#include <cmath>
#include <cstdint>

namespace moesaic::converter {
namespace {

/// Length of the valid UTF-8 sequence at the start of `s`, 0 if there is none.
std::size_t utf8_length(std::string_view s) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(s[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return 1;
  const std::size_t n = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || s.size() < n) return 0;
  std::uint32_t code = lead & (0xFFU >> (n + 1));
  for (std::size_t i = 1; i < n; ++i) {
    if ((byte(i) & 0xC0U) != 0x80U) return 0;
    code = code << 6U | (byte(i) & 0x3FU);
  }
  const std::uint32_t least = n == 2 ? 0x80 : n == 3 ? 0x800 : 0x10000;
  const bool surrogate = code >= 0xD800 && code <= 0xDFFF;
  return code >= least && code <= 0x10FFFF && !surrogate ? n : 0;
}

/// A coordinate: tenths of a unit are finer than any screen shows here.
std::string at(double v) { return number(v, 1); }

std::string titled(std::string_view tooltip, std::string_view element) {
  if (tooltip.empty()) return fmt::format("/>\n");
  return fmt::format("><title>{}</title></{}>\n", escape_html(tooltip), element);
}

}  // namespace

std::string escape_html(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t n = utf8_length(text.substr(i));
    const char c = text[i];
    if (n == 0) {
      out += "\xEF\xBF\xBD";
      ++i;
      continue;
    }
    if (c == '&') {
      out += "&amp;";
    } else if (c == '<') {
      out += "&lt;";
    } else if (c == '>') {
      out += "&gt;";
    } else if (c == '"') {
      out += "&quot;";
    } else if (c == '\'') {
      out += "&#39;";
    } else if (n > 1 || (static_cast<unsigned char>(c) >= 0x20 && c != 0x7F)) {
      out += text.substr(i, n);
    } else if (c == '\n' || c == '\t') {
      out += ' ';
    }
    i += n;
  }
  return out;
}

std::string number(double value, int decimals) {
  if (!std::isfinite(value)) return "–";
  std::string s = fmt::format("{:.{}f}", value, decimals);
  if (s.find('.') != std::string::npos) {
    s.erase(s.find_last_not_of('0') + 1);
    if (s.back() == '.') s.pop_back();
  }
  return s == "-0" ? "0" : s;
}

std::vector<double> nice_ticks(double max, int n) {
  if (!(max > 0) || !std::isfinite(max)) max = 1;
  const double raw = max / n;
  const double magnitude = std::pow(10.0, std::floor(std::log10(raw)));
  double step = 10 * magnitude;
  for (const double factor : {1.0, 2.0, 2.5, 5.0}) {
    if (factor * magnitude >= raw * (1 - 1e-9)) {
      step = factor * magnitude;
      break;
    }
  }
  std::vector<double> ticks{0};
  while (ticks.back() < max * (1 - 1e-9)) {
    ticks.push_back(static_cast<double>(ticks.size()) * step);
  }
  return ticks;
}

Svg::Svg(std::string_view id, double width, double height, std::string_view title,
         std::string_view desc) {
  body_ = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" role=\"img\" "
      "aria-labelledby=\"{}-title {}-desc\">\n<title id=\"{}-title\">{}</title>\n"
      "<desc id=\"{}-desc\">{}</desc>\n",
      at(width), at(height), id, id, id, escape_html(title), id, escape_html(desc));
}

void Svg::line(double x1, double y1, double x2, double y2, std::string_view css) {
  body_ += fmt::format("<line class=\"{}\" x1=\"{}\" y1=\"{}\" x2=\"{}\" y2=\"{}\"/>\n", css,
                       at(x1), at(y1), at(x2), at(y2));
}

void Svg::rect(double x, double y, double w, double h, std::string_view css,
               std::string_view tooltip) {
  body_ += fmt::format("<rect class=\"{}\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"{}", css,
                       at(x), at(y), at(w), at(h), titled(tooltip, "rect"));
}

void Svg::circle(double x, double y, double r, std::string_view css, std::string_view tooltip) {
  body_ += fmt::format("<circle class=\"{}\" cx=\"{}\" cy=\"{}\" r=\"{}\"{}", css, at(x), at(y),
                       at(r), titled(tooltip, "circle"));
}

void Svg::text(double x, double y, std::string_view text, std::string_view css) {
  body_ += fmt::format("<text class=\"{}\" x=\"{}\" y=\"{}\">{}</text>\n", css, at(x), at(y),
                       escape_html(text));
}

void Svg::vertical_text(double x, double y, std::string_view text, std::string_view css) {
  body_ +=
      fmt::format("<text class=\"{} mid\" transform=\"translate({} {}) rotate(-90)\">{}</text>\n",
                  css, at(x), at(y), escape_html(text));
}

}  // namespace moesaic::converter
