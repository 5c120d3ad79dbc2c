#include "tools/output.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>

#include "kernels/base/error.h"

namespace moesaic::tools {
namespace {

[[noreturn]] void throw_output_error(int error) {
  throw IoError(fmt::format("standard output: cannot write: {}", std::strerror(error)));
}

/// Characters shown, counting UTF-8 sequences once ("±").
std::size_t display_width(std::string_view text) {
  return static_cast<std::size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

}  // namespace

void print(std::string_view text) {
  errno = 0;
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size()) throw_output_error(errno);
}

void flush_output() {
  errno = 0;
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
    throw_output_error(errno != 0 ? errno : EIO);
  }
}

std::string to_text(const Json& value, bool indented) {
  return value.dump(indented ? 2 : -1, ' ', false, Json::error_handler_t::replace) + "\n";
}

std::string markdown_table(const std::vector<std::vector<std::string>>& rows) {
  if (rows.empty()) return {};
  std::vector<std::size_t> width(rows[0].size(), 3);
  for (const auto& row : rows) {
    for (std::size_t c = 0; c < row.size(); ++c) {
      width[c] = std::max(width[c], display_width(row[c]));
    }
  }
  std::string out;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    for (std::size_t c = 0; c < rows[r].size(); ++c) {
      const std::string pad(width[c] - display_width(rows[r][c]), ' ');
      out += c == 0 ? fmt::format("| {}{} ", rows[r][c], pad)
                    : fmt::format("| {}{} ", pad, rows[r][c]);
    }
    out += "|\n";
    if (r != 0) continue;
    for (std::size_t c = 0; c < width.size(); ++c) {
      const std::string dashes(width[c] - 1, '-');
      out += c == 0 ? fmt::format("| {}- ", dashes) : fmt::format("| {}: ", dashes);
    }
    out += "|\n";
  }
  return out;
}

std::string format_bytes(double bytes) {
  constexpr double kMiB = 1024.0 * 1024.0;
  if (bytes >= 1024 * kMiB) return fmt::format("{:.2f} GiB", bytes / (1024 * kMiB));
  if (bytes >= kMiB) return fmt::format("{:.2f} MiB", bytes / kMiB);
  return fmt::format("{:.2f} KiB", bytes / 1024);
}

std::string format_count(std::int64_t n) {
  const auto x = static_cast<double>(n);
  if (x >= 1e9) return fmt::format("{:.2f} B", x / 1e9);
  if (x >= 1e6) return fmt::format("{:.2f} M", x / 1e6);
  return fmt::format("{:.2f} K", x / 1e3);
}

}  // namespace moesaic::tools
