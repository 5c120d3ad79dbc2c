#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace moesaic::converter {

/// Text made safe for HTML and SVG, in content and in quoted attributes: markup escaped, control
/// characters dropped, bytes that are not UTF-8 replaced by U+FFFD.
std::string escape_html(std::string_view text);

/// A number with at most `decimals` decimals, trailing zeros dropped; "–" if not finite.
std::string number(double value, int decimals);

/// Round values 0, step, 2·step … whose last one is the first >= max; about `n` steps.
std::vector<double> nice_ticks(double max, int n);

/// One inline SVG drawing, accessible: role="img" named by its <title> and <desc>. Coordinates in
/// user units, y down; colours and fonts come from CSS classes of the page around it.
class Svg {
 public:
  /// `id` must be unique on the page and an XML name.
  Svg(std::string_view id, double width, double height, std::string_view title,
      std::string_view desc);

  void line(double x1, double y1, double x2, double y2, std::string_view css);
  void rect(double x, double y, double w, double h, std::string_view css,
            std::string_view tooltip = {});
  void circle(double x, double y, double r, std::string_view css, std::string_view tooltip = {});
  /// `css` chooses the anchor too: "start" (default), "mid", "end".
  void text(double x, double y, std::string_view text, std::string_view css);
  /// Text that reads upwards, centred on (x, y).
  void vertical_text(double x, double y, std::string_view text, std::string_view css);

  std::string str() const { return body_ + "</svg>\n"; }

 private:
  std::string body_;
};

}  // namespace moesaic::converter
