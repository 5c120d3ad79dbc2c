#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>

#include "kernels/base/context.h"
#include "kernels/base/error.h"
#include "models/evaluate.h"

namespace moesaic::tools {

/// A command line that parses but makes no sense: exit status 2.
class UsageError : public Error {
 public:
  using Error::Error;
};

/// Cores this process may run on (sched_getaffinity).
int available_cores();

/// Flags of every subcommand that runs a model.
struct RunOptions {
  int threads = available_cores();
  std::string device = "cpu";
  std::string activations = "q16";
  bool quiet = false;
};
/// Where a subcommand can run; without the word, on the CPU alone.
enum class Devices { Cpu, CpuAndCuda };
void add_run_options(CLI::App& cmd, RunOptions& options, Devices devices);
void add_run_options(CLI::App& cmd, RunOptions& options);

/// -o with the formats that the subcommand knows, the first being the default.
void add_output_option(CLI::App& cmd, std::string& format, const std::vector<std::string>& formats);

/// --chunks and --n-ctx.
void add_chunk_options(CLI::App& cmd, models::ChunkOptions& options);

/// Accepts a finite number in [low, high]; unlike CLI::Range it refuses "nan" and names what it
/// found.
CLI::Validator finite_between(double low, double high);
/// Accepts a whole number in [low, high].
CLI::Validator integer_between(std::int64_t low, std::int64_t high);

}  // namespace moesaic::tools
