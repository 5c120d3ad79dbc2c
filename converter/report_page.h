#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "converter/recovery/recover.h"

namespace moesaic::converter {

// Pieces of a page about one hybrid. Texts that are not ours go through escape_html first, but for
// fact(), which does that itself.

/// "43.8 %", with a space that does not break; a dash if not finite.
std::string percent(double fraction, int decimals = 1);
/// With so many decimals; a dash if not finite.
std::string fixed(double value, int decimals);
/// "1 h 5 min".
std::string duration(double seconds);
/// 12345678 → "12,345,678".
std::string grouped(std::int64_t n);

/// From the doctype to the end of <header>; <main> stays open.
std::string page_head(std::string_view title, std::string_view kicker, std::string_view heading,
                      std::string_view lead);
std::string page_end();
/// One of <dl class="cards">.
std::string card(std::string_view label, std::string_view value, std::string_view note);
/// A picture with its heading and what it tells.
std::string section(std::string_view heading, std::string_view text, std::string_view svg);
/// figure_recovery (report_figures.h) as a section of its own.
std::string recovery_section(const RecoveryReport& recovery);
/// One of <dl class="facts">.
std::string fact(std::string_view name, std::string_view value, bool code = true);

}  // namespace moesaic::converter
