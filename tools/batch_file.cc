#include "tools/batch_file.h"

#include <fmt/format.h>

#include <cmath>
#include <functional>
#include <limits>
#include <map>

#include "kernels/base/error.h"
#include "tools/session.h"

namespace moesaic::tools {
namespace {

/// What is wrong with one value: "found X, expected Y".
[[noreturn]] void mismatch(std::string_view key, const Json& found, std::string_view expected) {
  std::string text = to_text(found, false);
  text.pop_back();
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  throw InputError(fmt::format("{}: found {}, expected {}", key, text, expected));
}

std::int64_t whole_number(std::string_view key, const Json& value, std::int64_t low,
                          std::int64_t high) {
  const bool whole = value.is_number_integer() &&
                     !(value.is_number_unsigned() &&
                       value.get<std::uint64_t>() >
                           static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()));
  if (!whole || value.get<std::int64_t>() < low || value.get<std::int64_t>() > high) {
    mismatch(key, value, fmt::format("a whole number from {} to {}", low, high));
  }
  return value.get<std::int64_t>();
}

float real_number(std::string_view key, const Json& value) {
  if (!value.is_number()) mismatch(key, value, "a number");
  return value.get<float>();
}

std::string text_value(std::string_view key, const Json& value) {
  if (!value.is_string()) mismatch(key, value, "a string");
  return value.get<std::string>();
}

std::vector<std::string> stop_strings(std::string_view key, const Json& value) {
  if (value.is_string()) return {value.get<std::string>()};
  if (!value.is_array()) mismatch(key, value, "a string or a list of strings");
  std::vector<std::string> stops;
  for (const Json& item : value) {
    if (!item.is_string()) mismatch(key, value, "a string or a list of strings");
    stops.push_back(item.get<std::string>());
  }
  return stops;
}

std::vector<models::ChatMessage> chat_messages(std::string_view key, const Json& value) {
  if (!value.is_array() || value.empty()) {
    mismatch(key, value, "a list of {\"role\", \"content\"} objects");
  }
  std::vector<models::ChatMessage> messages;
  for (const Json& item : value) {
    const bool fits = item.is_object() && item.size() == 2 && item.contains("role") &&
                      item.contains("content") && item["role"].is_string() &&
                      item["content"].is_string();
    if (!fits) mismatch(key, item, "an object with the strings role and content");
    messages.push_back({item["role"].get<std::string>(), item["content"].get<std::string>()});
  }
  return messages;
}

using Setter = std::function<void(BatchItem&, std::string_view key, const Json& value)>;

const std::map<std::string, Setter, std::less<>>& setters() {
  constexpr int kMaxInt = std::numeric_limits<int>::max();
  static const std::map<std::string, Setter, std::less<>> table = {
      {"id", [](BatchItem& item, std::string_view, const Json& v) { item.id = v; }},
      {"prompt", [](BatchItem& item, std::string_view key,
                    const Json& v) { item.prompt = text_value(key, v); }},
      {"messages", [](BatchItem& item, std::string_view key,
                      const Json& v) { item.messages = chat_messages(key, v); }},
      {"max_tokens",
       [](BatchItem& item, std::string_view key, const Json& v) {
         item.options.max_tokens = static_cast<int>(whole_number(key, v, -1, kMaxInt));
       }},
      {"temperature",
       [](BatchItem& item, std::string_view key, const Json& v) {
         item.options.sampling.temperature = real_number(key, v);
       }},
      {"top_k",
       [](BatchItem& item, std::string_view key, const Json& v) {
         item.options.sampling.top_k = static_cast<int>(whole_number(key, v, 0, kMaxInt));
       }},
      {"top_p", [](BatchItem& item, std::string_view key,
                   const Json& v) { item.options.sampling.top_p = real_number(key, v); }},
      {"min_p", [](BatchItem& item, std::string_view key,
                   const Json& v) { item.options.sampling.min_p = real_number(key, v); }},
      {"repeat_penalty",
       [](BatchItem& item, std::string_view key, const Json& v) {
         item.options.sampling.repeat_penalty = real_number(key, v);
       }},
      {"repeat_last_n",
       [](BatchItem& item, std::string_view key, const Json& v) {
         item.options.sampling.repeat_last_n = static_cast<int>(whole_number(key, v, -1, kMaxInt));
       }},
      {"seed",
       [](BatchItem& item, std::string_view key, const Json& v) {
         item.options.sampling.seed = static_cast<std::uint64_t>(
             whole_number(key, v, 0, std::numeric_limits<std::int64_t>::max()));
       }},
      {"stop", [](BatchItem& item, std::string_view key,
                  const Json& v) { item.options.stop = stop_strings(key, v); }},
  };
  return table;
}

std::string known_keys() {
  std::string keys;
  for (const auto& [key, setter] : setters()) keys += (keys.empty() ? "" : ", ") + key;
  return keys;
}

BatchItem parse_line(const std::string& text, const PromptOptions& defaults) {
  const Json object = Json::parse(text, nullptr, false);
  require<InputError>(!object.is_discarded(), "not JSON, expected one object a line");
  require<InputError>(object.is_object(), "found {}, expected an object", object.type_name());
  BatchItem item;
  item.options = defaults;
  for (const auto& [key, value] : object.items()) {
    const auto setter = setters().find(key);
    require<InputError>(setter != setters().end(), "unknown key '{}', expected some of {}", key,
                        known_keys());
    setter->second(item, key, value);
  }
  require<InputError>(object.contains("prompt") != object.contains("messages"),
                      "found {} prompt and messages, expected one of them",
                      object.contains("prompt") ? "both" : "neither");
  engine::validate(item.options.sampling);
  return item;
}

}  // namespace

std::vector<BatchItem> read_batch(const std::filesystem::path& path,
                                  const PromptOptions& defaults) {
  const std::string text = read_input(path);
  std::vector<BatchItem> items;
  std::int64_t number = 0;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    const std::string line = text.substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    try {
      items.push_back(parse_line(line, defaults));
    } catch (const InputError& e) {
      throw InputError(fmt::format("{}:{}: {}", path.string(), number, e.what()));
    }
    items.back().line = number;
  }
  require<InputError>(!items.empty(), "{}: empty, expected one JSON object a line", path.string());
  return items;
}

}  // namespace moesaic::tools
