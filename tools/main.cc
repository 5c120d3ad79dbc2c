#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <new>
#include <string>

#include "kernels/base/error.h"
#include "tools/commands.h"
#include "tools/options.h"
#include "tools/output.h"
#include "tools/stop.h"

namespace {

constexpr int kFailed = 1;
constexpr int kBadUsage = 2;

constexpr const char* kExamples = R"(Examples:
  moesaic convert SmolLM2.gguf -o hybrid.gguf --data calibration.txt --active 0.5
  moesaic compare SmolLM2.gguf hybrid.gguf --data test.txt
  moesaic generate hybrid.gguf -p "The capital of France is"
Each subcommand has its own --help.)";

/// One line on standard error, whatever the text holds.
int report(std::string text, int status) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  while (!text.empty() && text.back() == ' ') text.pop_back();
  std::fprintf(stderr, "moesaic: error: %s\n", text.c_str());
  return status;
}

int run(int argc, char** argv) {
  CLI::App app(
      "Turns the dense MLPs of a checkpoint into a secret mixture of experts, and runs it.",
      "moesaic");
  app.footer(kExamples);
  app.set_version_flag("--version", "moesaic " MOESAIC_VERSION);
  app.require_subcommand(1);
  moesaic::tools::Action action;
  for (const auto add :
       {moesaic::tools::add_convert, moesaic::tools::add_recover, moesaic::tools::add_compare,
        moesaic::tools::add_eval, moesaic::tools::add_generate, moesaic::tools::add_bench,
        moesaic::tools::add_inspect, moesaic::tools::add_tokenize, moesaic::tools::add_score,
        moesaic::tools::add_report, moesaic::tools::add_study}) {
    add(app, action);
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& e) {  // --help, --version
    app.exit(e);
    moesaic::tools::flush_output();
    return 0;
  } catch (const CLI::ParseError& e) {
    const auto chosen = app.get_subcommands();
    if (chosen.empty()) {
      const bool named = argc > 1 && argv[1][0] != '-';
      return report(named ? fmt::format("unknown subcommand '{}' (see moesaic --help)", argv[1])
                          : fmt::format("{} (see moesaic --help)", e.what()),
                    kBadUsage);
    }
    return report(fmt::format("{} (see moesaic {} --help)", e.what(), chosen.front()->get_name()),
                  kBadUsage);
  }
  action();
  moesaic::tools::flush_output();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  moesaic::tools::install_signal_handlers();
  try {
    return run(argc, argv);
  } catch (const moesaic::tools::UsageError& e) {
    return report(e.what(), kBadUsage);
  } catch (const std::bad_alloc&) {
    return report("out of memory", kFailed);
  } catch (const std::exception& e) {
    return report(e.what(), kFailed);
  }
}
