#pragma once

#include <CLI/CLI.hpp>
#include <functional>

namespace moesaic::tools {

/// What the parsed command line asks for; run by main() after parsing, so that bad usage (exit 2)
/// and failed work (exit 1) stay apart.
using Action = std::function<void()>;

// Each registers one subcommand: its flags, and the action that it sets when chosen.
void add_convert(CLI::App& app, Action& action);
void add_recover(CLI::App& app, Action& action);
void add_compare(CLI::App& app, Action& action);
void add_eval(CLI::App& app, Action& action);
void add_generate(CLI::App& app, Action& action);
void add_bench(CLI::App& app, Action& action);
void add_inspect(CLI::App& app, Action& action);
void add_tokenize(CLI::App& app, Action& action);
void add_score(CLI::App& app, Action& action);
void add_report(CLI::App& app, Action& action);
void add_study(CLI::App& app, Action& action);

}  // namespace moesaic::tools
