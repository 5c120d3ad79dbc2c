#include <algorithm>
#include <array>

#include "kernels/base/error.h"
#include "models/tokenizer.h"

namespace moesaic::models {
namespace {

/// A chat as markers, which are one special token each, and the texts between them. A text is
/// encoded in one go, role and content together, because that is how a template's output is.
class ChatWriter {
 public:
  ChatWriter(const GgufFile& file, const Tokenizer& tokenizer)
      : file_(file), tokenizer_(tokenizer) {}

  void marker(std::string_view name) {
    flush();
    const auto ids = tokenizer_.encode(name, SpecialTokens::Parse);
    require<FormatError>(ids.size() == 1,
                         "{}: the chat template writes {}, which the vocabulary does not have as a "
                         "special token",
                         file_.path().string(), name);
    ids_.push_back(ids[0]);
  }
  void id(std::int32_t value) { ids_.push_back(value); }
  void text(std::string_view value) { pending_ += value; }
  std::vector<std::int32_t> finish() {
    flush();
    return std::move(ids_);
  }

 private:
  void flush() {
    const auto ids = tokenizer_.encode(pending_, SpecialTokens::Text);
    ids_.insert(ids_.end(), ids.begin(), ids.end());
    pending_.clear();
  }

  const GgufFile& file_;
  const Tokenizer& tokenizer_;
  std::string pending_;
  std::vector<std::int32_t> ids_;
};

bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

/// What Python's str.strip() takes away, as Jinja's trim does.
std::string_view trim(std::string_view text) {
  using namespace std::string_view_literals;
  constexpr std::array kSpaces = {"\t"sv,     "\n"sv,     "\v"sv,     "\f"sv,     "\r"sv,
                                  "\x1c"sv,   "\x1d"sv,   "\x1e"sv,   "\x1f"sv,   " "sv,
                                  "\u0085"sv, "\u00a0"sv, "\u1680"sv, "\u2000"sv, "\u2001"sv,
                                  "\u2002"sv, "\u2003"sv, "\u2004"sv, "\u2005"sv, "\u2006"sv,
                                  "\u2007"sv, "\u2008"sv, "\u2009"sv, "\u200a"sv, "\u2028"sv,
                                  "\u2029"sv, "\u202f"sv, "\u205f"sv, "\u3000"sv};
  const auto strip = [&](auto fits, auto remove) {
    for (;;) {
      const auto space = std::find_if(kSpaces.begin(), kSpaces.end(), fits);
      if (space == kSpaces.end()) return;
      remove(space->size());
    }
  };
  strip([&](auto space) { return text.starts_with(space); },
        [&](std::size_t n) { text.remove_prefix(n); });
  strip([&](auto space) { return text.ends_with(space); },
        [&](std::size_t n) { text.remove_suffix(n); });
  return text;
}

/// The system message that a ChatML template puts in front of a chat without one: the text of the
/// string literal '<|im_start|>system\n…<|im_end|>'. Nothing if the template has no such literal.
std::optional<std::string> default_system(std::string_view source) {
  constexpr std::string_view kBegin = "<|im_start|>system";
  for (std::size_t at = source.find(kBegin); at != std::string_view::npos;
       at = source.find(kBegin, at + 1)) {
    std::string_view rest = source.substr(at + kBegin.size());
    rest = rest.substr(0, rest.find("<|im_end|>"));
    std::string text;
    bool literal = true;
    for (std::size_t i = 0; i < rest.size() && literal; ++i) {
      if (rest[i] == '\\' && i + 1 < rest.size()) {
        ++i;
        text += rest[i] == 'n' ? '\n' : rest[i] == 't' ? '\t' : rest[i];
      } else {
        // An unescaped quote or a brace ends the literal: what follows is an expression.
        literal = rest[i] != '\'' && rest[i] != '"' && rest[i] != '{';
        text += rest[i];
      }
    }
    if (literal && text.starts_with('\n')) return text.substr(1);
  }
  return std::nullopt;
}

void write_chatml(ChatWriter& out, std::string_view source,
                  const std::vector<ChatMessage>& messages) {
  const auto turn = [&](std::string_view role, std::string_view content) {
    out.marker("<|im_start|>");
    out.text(role);
    out.text("\n");
    out.text(content);
    out.marker("<|im_end|>");
    out.text("\n");
  };
  if (messages.front().role != "system") {
    if (const auto system = default_system(source)) turn("system", *system);
  }
  for (const ChatMessage& message : messages) turn(message.role, message.content);
  out.marker("<|im_start|>");
  out.text("assistant\n");
}

void write_gemma(ChatWriter& out, std::string_view source,
                 const std::vector<ChatMessage>& messages) {
  // Gemma has no system turn: the message goes in front of the first user's, untrimmed.
  std::string system;
  std::size_t first = 0;
  if (messages.front().role == "system") {
    require<InputError>(!contains(source, "System role not supported"),
                        "chat: the model's template takes no system message");
    system = messages.front().content + "\n\n";
    first = 1;
  }
  require<InputError>(first < messages.size(), "chat: there is no user message");
  for (std::size_t i = first; i < messages.size(); ++i) {
    const std::string_view expected = (i - first) % 2 == 0 ? "user" : "assistant";
    require<InputError>(
        messages[i].role == expected,
        "chat: message {} is by \"{}\", expected \"{}\": the model's template wants "
        "user and assistant in turns",
        i, messages[i].role, expected);
    out.marker("<start_of_turn>");
    out.text(expected == "user" ? "user\n" : "model\n");
    if (i == first) out.text(system);
    out.text(trim(messages[i].content));
    out.marker("<end_of_turn>");
    out.text("\n");
  }
  out.marker("<start_of_turn>");
  out.text("model\n");
}

}  // namespace

std::vector<std::int32_t> encode_chat(const GgufFile& file, const Tokenizer& tokenizer,
                                      const std::vector<ChatMessage>& messages) {
  const std::string source = file.get_string("tokenizer.chat_template", "");
  require<InputError>(!source.empty(), "{}: the file has no chat template", file.path().string());
  const bool chatml = contains(source, "<|im_start|>");
  require<InputError>(
      chatml || contains(source, "<start_of_turn>"),
      "{}: the chat template is of no known family (ChatML with <|im_start|>, Gemma with "
      "<start_of_turn>)",
      file.path().string());
  require<InputError>(!messages.empty(), "chat: there are no messages");
  for (std::size_t i = 0; i < messages.size(); ++i) {
    const std::string& role = messages[i].role;
    require<InputError>(role == "system" || role == "user" || role == "assistant",
                        "chat: message {} is by \"{}\", expected system, user or assistant", i,
                        role);
    check_utf8(messages[i].content, fmt::format("chat: message {}", i));
  }

  ChatWriter out(file, tokenizer);
  const bool wants_bos = tokenizer.add_bos || contains(source, "bos_token");
  if (wants_bos && tokenizer.bos) out.id(*tokenizer.bos);
  if (chatml) {
    write_chatml(out, source, messages);
  } else {
    write_gemma(out, source, messages);
  }
  return out.finish();
}

}  // namespace moesaic::models
