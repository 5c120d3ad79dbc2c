#include <fmt/format.h>

#include <memory>

#include "tools/commands.h"
#include "tools/options.h"
#include "tools/output.h"
#include "tools/session.h"

namespace moesaic::tools {
namespace {

struct TokenizeOptions {
  std::string model;
  std::string file;
  std::string text;
  bool from_text = false;
  std::string format;
};

/// The ids one after the other as little-endian uint32.
std::string u32_bytes(const std::vector<std::int32_t>& ids) {
  std::string bytes;
  bytes.reserve(ids.size() * 4);
  for (const std::int32_t id : ids) {
    for (int shift = 0; shift < 32; shift += 8) bytes.push_back(static_cast<char>(id >> shift));
  }
  return bytes;
}

void tokenize(const TokenizeOptions& options) {
  const auto file = models::GgufFile::open(options.model);
  const auto tokenizer = models::load_tokenizer(*file);
  const std::string text = options.from_text ? options.text : read_input(options.file);
  models::check_utf8(text, options.from_text ? "-p" : options.file);
  const std::vector<std::int32_t> ids = tokenizer->encode(text, models::SpecialTokens::Parse);
  if (options.format == "u32") {
    print(u32_bytes(ids));
  } else if (options.format == "json") {
    print(to_text(Json(ids), false));
  } else {
    for (const std::int32_t id : ids) {
      print(fmt::format("{}\t{}", id, to_text(Json(tokenizer->piece(id, true)), false)));
    }
  }
}

}  // namespace

void add_tokenize(CLI::App& app, Action& action) {
  auto options = std::make_shared<TokenizeOptions>();
  CLI::App* cmd =
      app.add_subcommand("tokenize", "Token ids of a text, special tokens parsed, no BOS");
  cmd->add_option("MODEL", options->model, "Checkpoint (.gguf)")->required();
  auto* source = cmd->add_option_group("text");
  source->add_option("-f,--file", options->file, "Text file (-: standard input)");
  CLI::Option* text = source->add_option("-p,--prompt", options->text, "Text");
  source->require_option(1);
  add_output_option(*cmd, options->format, {"json", "u32", "text"});
  cmd->footer(
      R"(-o json prints an array, -o u32 raw little-endian uint32, -o text one id and its text a line.

Examples:
  moesaic tokenize SmolLM2.gguf -p "Hello world"
  moesaic tokenize SmolLM2.gguf --file wiki.test.raw -o u32 > wiki.test.u32)");
  cmd->callback([options, text, &action] {
    options->from_text = text->count() > 0;
    action = [options] { tokenize(*options); };
  });
}

}  // namespace moesaic::tools
