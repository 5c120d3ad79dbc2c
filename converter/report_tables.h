#pragma once

#include <cstdint>
#include <string>

#include "converter/convert.h"

namespace moesaic::converter {

/// What the cards and the table's last row say about all converted layers together.
struct Totals {
  std::size_t converted = 0;
  double error_closed_form = 0, error_distilled = 0;  // means
  std::int64_t experts = 0, never = 0;
  double overhead = 0;  // router and bypass over the dense MLP, mean
  Shares shares;        // of self-routed layers, means over them
};
Totals totals_of(const ConvertReport& report);

/// The table behind the pictures, one row a layer and a row of totals.
std::string low_rank_table(const ConvertReport& report, const Totals& t);
std::string self_routed_table(const ConvertReport& report, const Totals& t);

}  // namespace moesaic::converter
