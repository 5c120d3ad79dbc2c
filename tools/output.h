#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace moesaic::tools {

using Json = nlohmann::ordered_json;  // keys in the order in which they are documented

/// Writes to standard output. Throws IoError if that fails (disk full, reader gone).
void print(std::string_view text);
/// Flushes standard output and, where it is a file, makes sure the bytes found room. Throws
/// IoError.
void flush_output();

/// The value as JSON on one line or indented, with a newline. Text that is not UTF-8 is mended.
std::string to_text(const Json& value, bool indented = true);

/// A Markdown table, columns padded to the widest cell; the first row is the header, the first
/// column is left-aligned and the others right-aligned.
std::string markdown_table(const std::vector<std::vector<std::string>>& rows);

/// "93.21 MiB".
std::string format_bytes(double bytes);
/// "134.52 M".
std::string format_count(std::int64_t n);

}  // namespace moesaic::tools
