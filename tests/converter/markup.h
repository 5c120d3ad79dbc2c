#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace moesaic::converter {

/// Walks the tags of an XML-like text: every start tag has its end tag, attributes are quoted, no
/// stray '<' or '&'. The report is written as such, so that browsers and XML tools read it alike.
/// Returns what is wrong, empty if nothing.
inline std::string markup_fault(std::string_view s) {
  std::vector<std::string> open;
  std::size_t i = s.starts_with("<!DOCTYPE html>") ? 15 : 0;
  for (; i < s.size(); ++i) {
    if (s[i] == '&') {
      const std::size_t end = s.find(';', i);
      const std::string_view name = s.substr(i, end == s.npos ? 1 : end - i + 1);
      if (name != "&amp;" && name != "&lt;" && name != "&gt;" && name != "&quot;" &&
          name != "&#39;") {
        return "stray & in " + std::string(s.substr(i, 20));
      }
    }
    if (s[i] != '<') continue;
    std::size_t end = i + 1;
    char quote = 0;
    for (; end < s.size() && (quote != 0 || s[end] != '>'); ++end) {
      if (s[end] == '<') return "stray < in " + std::string(s.substr(i, 40));
      if (s[end] == '"') quote = quote == 0 ? '"' : '\0';
    }
    if (end == s.size()) return "unfinished tag " + std::string(s.substr(i, 40));
    const std::string_view tag = s.substr(i + 1, end - i - 1);
    const bool closing = tag.starts_with('/');
    const std::string name(
        tag.substr(closing ? 1 : 0, tag.find_first_of(" /", 1) - (closing ? 1 : 0)));
    if (closing) {
      if (open.empty() || open.back() != tag.substr(1)) return "unexpected </" + name + ">";
      open.pop_back();
    } else if (!tag.ends_with('/')) {
      open.push_back(std::string(tag.substr(0, tag.find(' '))));
    }
    i = end;
  }
  return open.empty() ? "" : "unclosed <" + open.back() + ">";
}

/// Occurrences of `what` in `text`.
inline std::size_t count(const std::string& text, const std::string& what) {
  std::size_t n = 0;
  for (std::size_t i = text.find(what); i != text.npos; i = text.find(what, i + 1)) ++n;
  return n;
}

}  // namespace moesaic::converter
