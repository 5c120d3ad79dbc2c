#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "converter/study/study.h"

namespace moesaic::converter::study {

/// The report with the keys of docs/cli.md. Numbers that are not finite become null.
nlohmann::ordered_json to_json(const StudyReport& report);

/// One cell's training and our own start, as kept between runs and as they stand in the report.
nlohmann::ordered_json to_json(const CellResult& result);
nlohmann::ordered_json to_json(const OwnStart& own);

/// Back again: what was measured (held_out, rate, by_rate, seconds) into `result`; an own start.
/// Throw FormatError that names `file`.
void read_cell(const nlohmann::json& json, const std::string& file, CellResult& result);
OwnStart read_own(const nlohmann::json& json, const std::string& file);

}  // namespace moesaic::converter::study
