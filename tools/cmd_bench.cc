#include <fmt/chrono.h>
#include <fmt/format.h>

#include <ctime>
#include <map>
#include <memory>
#include <optional>

#include "engine/throughput.h"
#include "models/gguf_writer.h"
#include "tools/bench_output.h"
#include "tools/commands.h"
#include "tools/crossover.h"
#include "tools/flops.h"
#include "tools/machine_limits.h"
#include "tools/options.h"
#include "tools/output.h"
#include "tools/path_constants.h"
#include "tools/progress.h"
#include "tools/session.h"

namespace moesaic::tools {
namespace {

using Numbers = std::vector<std::int64_t>;

constexpr std::int64_t kMaxTokens = std::int64_t{1} << 20;

struct BenchOptions {
  std::string model;
  Numbers prompt = {512};
  Numbers generate = {128};
  Numbers batch = {engine::Work().n_batch};
  Numbers depth = {0};
  Numbers sequences = {1};
  Numbers threads = {available_cores()};
  int repetitions = 5;
  std::string format;
  RunOptions run;

  bool costs = false;
  bool crossover = false;
  std::string hybrid;
  std::vector<double> active;
  std::string json_file, svg_file;
};

std::string utc_now() {
  return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)));
}

/// Every prompt length with every batch size, every generated length with every number of
/// sequences; all of them at every depth.
std::vector<engine::Work> planned(const BenchOptions& options) {
  std::vector<engine::Work> plan;
  for (const std::int64_t depth : options.depth) {
    engine::Work work;
    work.depth = depth;
    for (const std::int64_t n : options.prompt) {
      if (n == 0) continue;
      for (const std::int64_t batch : options.batch) {
        work.n_prompt = n;
        work.n_batch = batch;
        plan.push_back(work);
      }
    }
    work.n_prompt = 0;
    work.n_batch = options.batch.front();
    for (const std::int64_t n : options.generate) {
      if (n == 0) continue;
      for (const std::int64_t sequences : options.sequences) {
        work.n_gen = n;
        work.n_sequences = sequences;
        plan.push_back(work);
      }
    }
  }
  return plan;
}

void bench(const BenchOptions& options) {
  const std::vector<engine::Work> plan = planned(options);
  if (plan.empty()) throw UsageError("-p 0 and -n 0 leave nothing to measure");

  Progress progress(options.run.quiet);
  BenchedModel described{.path = options.model, .description = {}};
  std::vector<BenchedTest> tests;
  for (const std::int64_t threads : options.threads) {
    RunOptions run = options.run;
    run.threads = static_cast<int>(threads);
    Runtime runtime(run);
    Model model(options.model, runtime.context, run.device);
    const TensorTotals totals = tensor_totals(*model.checkpoint->file);
    described.description = describe_model(*model.checkpoint);
    described.bytes = totals.bytes;
    described.n_params = totals.elements;
    std::optional<MachineLimits> limits;
    if (model.on_gpu == nullptr) limits.emplace(runtime.pool);
    for (const engine::Work& work : plan) {
      BenchedTest& test = tests.emplace_back();
      if (!limits) test.backend = "CUDA";
      test.work = work;
      test.threads = run.threads;
      test.activations = run.activations;
      test.time = utc_now();
      test.flops_per_token = flops_per_token(*model.checkpoint, work);
      if (limits) limits->restart();
      test.result =
          engine::measure(model.decoder(), runtime.tally, work, options.repetitions, progress, [&] {
            if (limits) limits->sample();
          });
      if (!limits) continue;
      test.read_bandwidth = limits->read_bandwidth();
      test.read_range = limits->read_range();
      test.peak_flops = limits->peak_flops();
    }
  }
  if (options.format == "md") {
    print(bench_table(described, tests));
    return;
  }
  const std::vector<Json> rows = bench_json(described, tests);
  if (options.format == "json") {
    print(to_text(Json(rows)));
  } else if (options.format == "csv") {
    print(bench_csv(rows));
  } else {
    for (const Json& row : rows) print(to_text(row, false));
  }
}

/// The one value of a list that a sweep over something else takes.
std::int64_t only(const Numbers& values, std::string_view flag) {
  if (values.size() != 1) {
    throw UsageError(
        fmt::format("{}: {} values given, expected one with --crossover", flag, values.size()));
  }
  return values.front();
}

void crossover(const BenchOptions& options) {
  CrossoverSettings settings;
  settings.batches = options.sequences;
  settings.fractions = options.active;
  settings.n_gen = only(options.generate, "--n-gen");
  settings.depth = only(options.depth, "--n-depth");
  settings.repetitions = options.repetitions;
  RunOptions run = options.run;
  run.threads = static_cast<int>(only(options.threads, "--threads"));
  if (settings.n_gen == 0) throw UsageError("-n 0 leaves nothing to measure");
  for (const std::string& file : {options.json_file, options.svg_file}) {
    if (!file.empty()) models::check_writable(file, 1 << 16);
  }

  Runtime runtime(run);
  Model dense(options.model, runtime.context);
  Model hybrid(options.hybrid, runtime.context);
  Progress progress(run.quiet);
  Crossover result = measure_crossover(dense.transformer, hybrid.transformer, settings, progress);
  result.dense = describe_model(*dense.checkpoint);
  result.hybrid = describe_model(*hybrid.checkpoint);
  result.cpu = cpu_name();
  result.activations = run.activations;
  result.threads = run.threads;
  if (!options.json_file.empty()) {
    models::write_file_atomically(options.json_file, to_text(crossover_json(result)));
  }
  if (!options.svg_file.empty()) {
    models::write_file_atomically(options.svg_file, crossover_svg(result));
  }
  print(options.format == "json"  ? to_text(crossover_json(result))
        : options.format == "svg" ? crossover_svg(result)
                                  : crossover_table(result));
}

// ---- --costs

std::string path_name(kernels::MoePath path) {
  switch (path) {
    case kernels::MoePath::Gather:
      return "gather";
    case kernels::MoePath::Grouped:
      return "grouped";
    default:
      return "masked";
  }
}

/// Measures the constants anew, keeps them for later runs, and prints what follows from them.
void costs(const BenchOptions& options) {
  RunOptions run = options.run;
  run.threads = static_cast<int>(only(options.threads, "--threads"));
  Runtime runtime(run);
  Model model(options.model, runtime.context);
  auto layers = packed_layers(runtime.context, *model.checkpoint);
  require<InputError>(
      !layers.empty(),
      "{}: no layer behind a router with packed weights, expected a hybrid of `convert "
      "--recipe low-rank` with experts in BF16, Q8_0, Q4_0 or Q4_1, and "
      "--activations q16 on a machine with AVX-512",
      options.model);
  const kernels::PathConstants constants = measure_path_constants(runtime.context, layers);
  store_path_constants(runtime.context, layers, constants);

  Json rows = Json::array();
  std::vector<std::vector<std::string>> table = {
      {"tokens", "gather µs", "grouped µs", "masked µs", "layers: gather", "grouped", "masked"}};
  for (const std::int64_t n : options.sequences) {
    kernels::PathCosts sum;
    std::map<kernels::MoePath, int> chosen;
    for (kernels::SecretMoeView& layer : layers) {
      layer.costs = constants;
      const kernels::PathCosts costs = kernels::packed_path_costs(layer, n);
      sum.gather += costs.gather;
      sum.grouped += costs.grouped;
      sum.masked += costs.masked;
      ++chosen[kernels::choose_moe_path(runtime.context, layer, n)];
    }
    const auto micros = [&](double ns) { return ns / 1e3 / static_cast<double>(layers.size()); };
    Json row = {{"n_tokens", n},
                {"gather_us", micros(sum.gather)},
                {"grouped_us", micros(sum.grouped)},
                {"masked_us", micros(sum.masked)}};
    std::vector<std::string> cells = {std::to_string(n)};
    for (const double ns : {sum.gather, sum.grouped, sum.masked}) {
      cells.push_back(fmt::format("{:.1f}", micros(ns)));
    }
    for (const auto path :
         {kernels::MoePath::Gather, kernels::MoePath::Grouped, kernels::MoePath::Masked}) {
      row["layers_" + path_name(path)] = chosen[path];
      cells.push_back(std::to_string(chosen[path]));
    }
    rows.push_back(std::move(row));
    table.push_back(std::move(cells));
  }
  if (options.format == "json") {
    print(to_text(Json{{"constants", to_json(constants)}, {"costs", rows}}));
    return;
  }
  print(markdown_table(table) +
        fmt::format(
            "\nestimates of a mean layer; measured in ns per column: gather {:.4f} and grouped "
            "{:.4f} per token and active neuron, grouped {:.4f} more per neuron that the "
            "batch needs, masked {:.4f} per token and neuron, at least {:.4f} per neuron\n",
            constants.gather, constants.grouped, constants.grouped_read, constants.masked,
            constants.masked_least));
}

/// --crossover has other formats and defaults than the plain table; what the user gave stays.
void run_bench(BenchOptions& options, const CLI::App& cmd) {
  const auto given = [&](const char* flag) { return cmd.get_option(flag)->count() > 0; };
  if ((options.costs || options.crossover) && options.run.device != "cpu") {
    throw UsageError(fmt::format("--device {}: expected cpu with {}", options.run.device,
                                 options.costs ? "--costs" : "--crossover"));
  }
  if (options.costs) {
    for (const char* flag :
         {"--crossover", "--n-prompt", "--n-gen", "--batch-size", "--n-depth", "--repetitions"}) {
      if (given(flag)) throw UsageError(fmt::format("{} does not go with --costs", flag));
    }
    if (options.format != "md" && options.format != "json") {
      throw UsageError(fmt::format("-o {}: expected md or json with --costs", options.format));
    }
    if (!given("--sequences")) options.sequences = {1, 2, 4, 8, 16, 32, 64, 512};
    costs(options);
    return;
  }
  if (!options.crossover) {
    for (const char* flag : {"--hybrid", "--active", "--json-file", "--svg-file"}) {
      if (given(flag)) throw UsageError(fmt::format("{} goes with --crossover", flag));
    }
    if (options.format == "svg") throw UsageError("-o svg goes with --crossover");
    bench(options);
    return;
  }
  for (const char* flag : {"--n-prompt", "--batch-size"}) {
    if (given(flag)) throw UsageError(fmt::format("{} does not go with --crossover", flag));
  }
  if (options.hybrid.empty()) throw UsageError("--crossover: --hybrid HYBRID is required");
  if (options.format == "jsonl" || options.format == "csv") {
    throw UsageError(
        fmt::format("-o {}: expected md, json or svg with --crossover", options.format));
  }
  const CrossoverSettings defaults;
  if (!given("--n-gen")) options.generate = {defaults.n_gen};
  if (!given("--sequences")) options.sequences = defaults.batches;
  crossover(options);
}

void add_list(CLI::App& cmd, const std::string& names, Numbers& values, std::int64_t low,
              std::int64_t high, const std::string& help) {
  cmd.add_option(names, values, help)
      ->check(integer_between(low, high))
      ->delimiter(',')
      ->allow_extra_args(false)
      ->type_name("N[,N]")
      ->capture_default_str();
}

}  // namespace

void add_bench(CLI::App& app, Action& action) {
  auto options = std::make_shared<BenchOptions>();
  CLI::App* cmd =
      app.add_subcommand("bench", "Tokens per second of prefill and decode, as llama-bench");
  cmd->add_option("MODEL", options->model, "Checkpoint (.gguf), dense or hybrid")->required();
  add_list(*cmd, "-p,--n-prompt", options->prompt, 0, kMaxTokens, "Prompt lengths; 0: none");
  add_list(*cmd, "-n,--n-gen", options->generate, 0, kMaxTokens,
           "Tokens to generate; 0: none (default with --crossover: 16)");
  add_list(*cmd, "-b,--batch-size", options->batch, 1, kMaxTokens, "Tokens per prefill pass");
  add_list(*cmd, "-d,--n-depth", options->depth, 0, kMaxTokens,
           "Tokens in the cache before the timed part");
  add_list(*cmd, "--sequences,--npl", options->sequences, 1, 4096,
           "Sequences decoded together, each of the -n tokens (default with --crossover: "
           "1,2,4,8,16,32,64)");
  cmd->add_option("-r,--repetitions", options->repetitions, "Measurements of each")
      ->check(integer_between(1, 10000))
      ->capture_default_str();
  add_output_option(*cmd, options->format, {"md", "json", "jsonl", "csv", "svg"});
  add_run_options(*cmd, options->run, Devices::CpuAndCuda);
  // The flag that every command has takes a list here.
  cmd->remove_option(cmd->get_option("--threads"));
  add_list(*cmd, "-t,--threads", options->threads, 1, 1024,
           "Threads (default: all cores this process may use)");
  cmd->add_flag("--costs", options->costs,
                "Measure what the ways to run a hybrid's layers cost on this machine, keep it for "
                "later runs, print it with what is chosen by --sequences (tokens of a pass)");
  cmd->add_flag("--crossover", options->crossover,
                "Decode speed of a hybrid over that of MODEL, by sequences and active fraction");
  cmd->add_option("--hybrid", options->hybrid, "--crossover: hybrid made from MODEL (.gguf)");
  cmd->add_option("--active", options->active,
                  "--crossover: active fractions of the MLPs (default: six, from no routed neuron "
                  "to all)")
      ->check(finite_between(0, 2))
      ->delimiter(',')
      ->allow_extra_args(false)
      ->type_name("F[,F]");
  cmd->add_option("--json-file", options->json_file, "--crossover: also write the JSON there");
  cmd->add_option("--svg-file", options->svg_file, "--crossover: also write the picture there");
  cmd->footer(
      R"(Bytes per token are counted by the kernels; the limit of decode is the memory's read bandwidth,
that of prefill the FLOP/s of a bf16 matrix product, both measured with as many threads before,
between and after the repetitions (median).

Examples:
  moesaic bench SmolLM2.gguf
  moesaic bench hybrid.gguf -p 128,512 -n 128 -t 1,2 -r 10 -o json
  moesaic bench SmolLM2.gguf -p 0 -n 32 --sequences 1,4,16 -d 512
  moesaic bench hybrid.gguf --costs
  moesaic bench SmolLM2.gguf --crossover --hybrid hybrid.gguf --svg-file crossover.svg)");
  cmd->callback(
      [options, cmd, &action] { action = [options, cmd] { run_bench(*options, *cmd); }; });
}

}  // namespace moesaic::tools
