#pragma once

#include <string_view>

namespace moesaic::converter {

/// CSS of the program's pages: colours in light and dark, cards, figures, tables, print.
std::string_view report_style();

}  // namespace moesaic::converter
