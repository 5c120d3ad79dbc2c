#include <fmt/chrono.h>
#include <fmt/format.h>

#include <chrono>
#include <ctime>
#include <fstream>
#include <memory>

#include "engine/throughput.h"
#include "tools/bandwidth.h"
#include "tools/commands.h"
#include "tools/options.h"
#include "tools/output.h"
#include "tools/progress.h"
#include "tools/session.h"

namespace moesaic::tools {
namespace {

constexpr std::int64_t kBatch = 512;  // tokens per prefill pass

struct BenchOptions {
  std::string model;
  std::vector<std::int64_t> prompt = {512};
  std::vector<std::int64_t> generate = {128};
  int repetitions = 5;
  std::string format;
  RunOptions run;
};

/// One line of the table: pp N or tg N.
struct Test {
  std::int64_t n_prompt = 0;
  std::int64_t n_gen = 0;
  engine::Throughput result;
  std::string time;  // ISO 8601, UTC

  std::int64_t n_tokens() const { return n_prompt + n_gen; }
  std::string name() const {
    return n_prompt > 0 ? fmt::format("pp{}", n_prompt) : fmt::format("tg{}", n_gen);
  }
};

std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

std::string utc_now() {
  return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)));
}

/// llama-bench's keys for one test, and ours after them.
Json as_json(const Test& test, const BenchOptions& options, const Model& model, double bandwidth) {
  const TensorTotals totals = tensor_totals(*model.checkpoint->file);
  std::vector<double> nanoseconds;
  for (const double tps : test.result.tokens_per_second) {
    nanoseconds.push_back(1e9 * static_cast<double>(test.n_tokens()) / tps);
  }
  double sum = 0;
  for (const double ns : nanoseconds) sum += ns;
  return {{"build_commit", MOESAIC_VERSION},
          {"cpu_info", cpu_name()},
          {"backends", "CPU"},
          {"model_filename", options.model},
          {"model_type", describe_model(*model.checkpoint)},
          {"model_size", totals.bytes},
          {"model_n_params", totals.elements},
          {"n_batch", kBatch},
          {"n_ubatch", kBatch},
          {"n_threads", options.run.threads},
          {"type_k", "f32"},
          {"type_v", "f32"},
          {"activations", options.run.activations},
          {"n_prompt", test.n_prompt},
          {"n_gen", test.n_gen},
          {"test_time", test.time},
          {"avg_ns", sum / static_cast<double>(nanoseconds.size())},
          {"stddev_ns", sample_stddev(nanoseconds)},
          {"avg_ts", test.result.mean},
          {"stddev_ts", test.result.stddev},
          {"samples_ns", nanoseconds},
          {"samples_ts", test.result.tokens_per_second},
          {"bytes_per_token", test.result.bytes_per_token},
          {"bandwidth_fraction", test.result.bytes_per_token * test.result.mean / bandwidth},
          {"read_bandwidth", bandwidth}};
}

/// One line per test; texts quoted, lists left to JSON.
std::string as_csv(const std::vector<Json>& tests) {
  std::string out;
  for (std::size_t i = 0; i < tests.size(); ++i) {
    std::string keys, values;
    for (const auto& [key, value] : tests[i].items()) {
      if (value.is_array()) continue;
      const char* comma = keys.empty() ? "" : ",";
      keys += comma + key;
      std::string text = value.is_string() ? value.get<std::string>() : value.dump();
      for (std::size_t q = text.find('"'); q != std::string::npos; q = text.find('"', q + 2)) {
        text.insert(q, 1, '"');
      }
      values += fmt::format("{}\"{}\"", comma, text);
    }
    if (i == 0) out += keys + "\n";
    out += values + "\n";
  }
  return out;
}

std::string as_table(const std::vector<Test>& tests, const BenchOptions& options,
                     const Model& model, double bandwidth) {
  const TensorTotals totals = tensor_totals(*model.checkpoint->file);
  std::vector<std::vector<std::string>> rows = {
      {"model", "size", "params", "backend", "threads", "test", "t/s", "MB/token", "of bandwidth"}};
  for (const Test& test : tests) {
    const double share = test.result.bytes_per_token * test.result.mean / bandwidth;
    rows.push_back({describe_model(*model.checkpoint),
                    format_bytes(static_cast<double>(totals.bytes)), format_count(totals.elements),
                    "CPU", std::to_string(options.run.threads), test.name(),
                    fmt::format("{:.2f} ± {:.2f}", test.result.mean, test.result.stddev),
                    fmt::format("{:.3f}", test.result.bytes_per_token / 1e6),
                    fmt::format("{:.0f} %", 100 * share)});
  }
  return fmt::format("{}\nMemory read bandwidth, measured in this run: {:.1f} GB/s\n",
                     markdown_table(rows), bandwidth / 1e9);
}

void bench(const BenchOptions& options) {
  std::vector<Test> tests;
  for (const std::int64_t n : options.prompt) {
    if (n > 0) tests.push_back({.n_prompt = n, .n_gen = 0, .result = {}, .time = {}});
  }
  for (const std::int64_t n : options.generate) {
    if (n > 0) tests.push_back({.n_prompt = 0, .n_gen = n, .result = {}, .time = {}});
  }
  if (tests.empty()) throw UsageError("-p 0 and -n 0 leave nothing to measure");

  Runtime runtime(options.run);
  Model model(options.model, runtime.context);
  Progress progress(options.run.quiet);
  const double bandwidth = measure_read_bandwidth(runtime.pool);
  for (Test& test : tests) {
    test.time = utc_now();
    test.result = test.n_prompt > 0
                      ? engine::measure_prefill(model.transformer, runtime.tally, test.n_prompt,
                                                kBatch, options.repetitions, progress)
                      : engine::measure_decode(model.transformer, runtime.tally, test.n_gen,
                                               options.repetitions, progress);
  }
  if (options.format == "md") {
    print(as_table(tests, options, model, bandwidth));
    return;
  }
  std::vector<Json> rows;
  for (const Test& test : tests) rows.push_back(as_json(test, options, model, bandwidth));
  print(options.format == "json" ? to_text(Json(rows)) : as_csv(rows));
}

}  // namespace

void add_bench(CLI::App& app, Action& action) {
  auto options = std::make_shared<BenchOptions>();
  CLI::App* cmd =
      app.add_subcommand("bench", "Tokens per second of prefill and decode, as llama-bench");
  cmd->add_option("MODEL", options->model, "Checkpoint (.gguf), dense or hybrid")->required();
  cmd->add_option("-p,--n-prompt", options->prompt, "Prompt lengths, comma-separated; 0: none")
      ->check(integer_between(0, std::int64_t{1} << 20))
      ->delimiter(',')
      ->allow_extra_args(false)
      ->type_name("N[,N]")
      ->capture_default_str();
  cmd->add_option("-n,--n-gen", options->generate, "Tokens to generate, comma-separated; 0: none")
      ->check(integer_between(0, std::int64_t{1} << 20))
      ->delimiter(',')
      ->allow_extra_args(false)
      ->type_name("N[,N]")
      ->capture_default_str();
  cmd->add_option("-r,--repetitions", options->repetitions, "Measurements of each")
      ->check(integer_between(1, 10000))
      ->capture_default_str();
  add_output_option(*cmd, options->format, {"md", "json", "csv"});
  add_run_options(*cmd, options->run);
  cmd->footer(
      R"(Bytes per token are counted by the kernels; their share of the memory's read bandwidth is
measured against a streaming read in the same run.

Examples:
  moesaic bench SmolLM2.gguf
  moesaic bench hybrid.gguf -p 128,512 -n 128 -r 10 -o json)");
  cmd->callback([options, &action] { action = [options] { bench(*options); }; });
}

}  // namespace moesaic::tools
