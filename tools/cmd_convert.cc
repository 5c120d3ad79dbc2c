#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <filesystem>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <vector>

#include "converter/convert.h"
#include "converter/recipe.h"
#include "tools/commands.h"
#include "tools/device.h"
#include "tools/dtype_names.h"
#include "tools/options.h"
#include "tools/output.h"
#include "tools/progress.h"
#include "tools/recover_options.h"
#include "tools/session.h"

namespace moesaic::tools {
namespace {

struct Options {
  converter::ConvertOptions convert;
  std::string model, output;
  std::string expert_type, router_type, layers;
  std::string budget = "planned", plan, curves;
  RunOptions run;
};

/// True where both paths name one file, whether or not it exists yet.
bool same_file(const std::filesystem::path& a, const std::filesystem::path& b) {
  std::error_code error;
  if (std::filesystem::equivalent(a, b, error)) return true;
  return std::filesystem::weakly_canonical(a, error) == std::filesystem::weakly_canonical(b, error);
}

std::filesystem::path with_suffix(std::filesystem::path path, const char* suffix) {
  return path += suffix;
}

using Rows = std::vector<std::vector<std::string>>;

Rows routed_rows(const converter::ConvertReport& report) {
  Rows rows = {{"layer", "kind", "shared", "experts", "neurons each", "selected", "router rank",
                "bypass rank", "active", "closed form", "distilled"}};
  for (const converter::LayerReport& layer : report.layers) {
    const bool dense = layer.kind == "dense";
    const auto count = [dense](std::int64_t n) { return dense ? "" : std::to_string(n); };
    const auto error = [dense](double v) {
      return dense || std::isnan(v) ? "" : fmt::format("{:.4f}", v);
    };
    rows.push_back({std::to_string(layer.layer), layer.kind, count(layer.n_shared),
                    count(layer.n_experts), count(layer.expert_neurons), count(layer.n_active),
                    count(layer.router_rank), count(layer.bypass_rank),
                    fmt::format("{:.3f}", layer.active_fraction), error(layer.error_closed_form),
                    error(layer.error_distilled)});
  }
  return rows;
}

Rows self_routed_rows(const converter::ConvertReport& report) {
  Rows rows = {{"layer", "kind", "inputs", "routed", "kept", "active", "predicted KL", "error"}};
  for (const converter::LayerReport& layer : report.layers) {
    std::vector<std::string> row = {std::to_string(layer.layer), layer.kind};
    if (is_self_routed(layer)) {
      for (const double share : {layer.shares.input, layer.shares.gate, layer.shares.hidden}) {
        row.push_back(fmt::format("{:.3f}", share));
      }
    } else {
      row.insert(row.end(), 3, "");
    }
    row.push_back(fmt::format("{:.3f}", layer.active_fraction));
    for (const double v : {layer.sensitivity, layer.error_closed_form}) {
      row.push_back(is_self_routed(layer) ? fmt::format("{:.4f}", v) : "");
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

std::string summary(const converter::ConvertOptions& options,
                    const converter::ConvertReport& report) {
  const std::filesystem::path& output = options.output;
  const converter::Method method = converter::find_recipe(options.recipe).method;
  const bool has_router =
      method == converter::Method::LowRank || method == converter::Method::Paper;
  std::string text = markdown_table(has_router ? routed_rows(report) : self_routed_rows(report));
  text += fmt::format("\nactive fraction {:.4f} (mean over layers{}), {} calibration tokens\n",
                      report.active_fraction, has_router ? ", router and bypass counted" : "",
                      report.n_tokens);
  if (report.recovery) {
    text += fmt::format(
        "KL divergence from dense on held-out text: {:.4f} before recovery, {:.4f} as written; "
        "errors and predicted KL above are from before it\n",
        report.recovery->kl_start, report.recovery->kl_packed);
  }
  text += fmt::format("{} and {} at most in memory\n\n{}\n", format_seconds(report.seconds),
                      format_bytes(static_cast<double>(report.peak_memory_bytes)), output.string());
  if (!has_router) text += with_suffix(output, ".plan.json").string() + "\n";
  return text + with_suffix(output, ".report.json").string() + "\n" +
         with_suffix(output, ".report.html").string() + "\n";
}

/// "3,5-8" as 3, 5, 6, 7, 8; nothing where it is no such list.
std::optional<std::vector<int>> parse_layers(const std::string& text) {
  constexpr int kMost = 1 << 16;
  std::vector<int> layers;
  const char* at = text.data();
  const char* const end = at + text.size();
  while (true) {
    int first = 0;
    std::from_chars_result read = std::from_chars(at, end, first);
    int last = first;
    if (read.ec == std::errc() && read.ptr != end && *read.ptr == '-') {
      read = std::from_chars(read.ptr + 1, end, last);
    }
    if (read.ec != std::errc() || first < 0 || last < first || last > kMost) return std::nullopt;
    for (int layer = first; layer <= last; ++layer) layers.push_back(layer);
    if (read.ptr == end) return layers;
    if (*read.ptr != ',') return std::nullopt;
    at = read.ptr + 1;
  }
}

// Whether an interrupted conversion left more than what it was and how long it took.
bool holds_results(const std::filesystem::path& state) {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(state, error)) {
    const std::filesystem::path name = entry.path().filename();
    if (name != "job.json" && name != "time.json") return true;
  }
  return false;
}

void convert(Options& options) {
  converter::ConvertOptions& convert = options.convert;
  convert.model = options.model;
  convert.output = options.output;
  if (same_file(convert.model, convert.output)) {
    throw UsageError(
        fmt::format("-o {}: is the checkpoint to convert, expected another file", options.output));
  }
  convert.budget =
      options.budget == "planned" ? converter::Budget::Planned : converter::Budget::Uniform;
  convert.plan = options.plan;
  convert.curves = options.curves;
  if (!options.layers.empty()) convert.layers = *parse_layers(options.layers);
  if (!options.expert_type.empty()) convert.expert_dtype = dtype_from_name(options.expert_type);
  if (!options.router_type.empty()) convert.router_dtype = dtype_from_name(options.router_type);
  convert.device = make_converter_device(options.run.device);

  Runtime runtime(options.run);
  Progress progress(options.run.quiet);
  try {
    print(summary(convert, converter::convert(convert, runtime.context, progress)));
  } catch (const Interrupted&) {
    const std::filesystem::path state = with_suffix(convert.output, ".state");
    throw Interrupted(
        holds_results(state)
            ? fmt::format("interrupted: what was finished is kept in {}; the same command with "
                          "--resume goes on from there",
                          state.string())
            : "interrupted: nothing was finished yet, the same command begins anew");
  }
}

}  // namespace

void add_convert(CLI::App& app, Action& action) {
  auto options = std::make_shared<Options>();
  converter::ConvertOptions& convert_options = options->convert;
  CLI::App* cmd = app.add_subcommand("convert", "Dense checkpoint → secret mixture of experts");
  cmd->add_option("MODEL", options->model, "Checkpoint (.gguf)")->required();
  cmd->add_option("-o,--output", options->output, "Hybrid to write (.gguf)")->required();
  cmd->add_option("--data", convert_options.data,
                  "Calibration text file, or self: text that the model samples itself")
      ->capture_default_str();
  cmd->add_option("--active", convert_options.active,
                  "Mean active fraction of the MLPs, router and bypass counted")
      ->check(finite_between(0.01, 1))
      ->capture_default_str();
  cmd->add_option("--recipe", convert_options.recipe,
                  "fast: self-routed layers under a measured budget, minutes; best: the same, then "
                  "trained end to end; threshold: magnitude thresholds alone (TEAL), the rival; "
                  "low-rank: experts behind low-rank routers, fitted and distilled layer by layer; "
                  "paper, peer, sgatlin: the papers' students, trained from a random start (GELU "
                  "experts behind a low-rank router or product keys, linear ones behind product "
                  "keys), far worse at this size")
      ->check(CLI::IsMember({"fast", "best", "threshold", "low-rank", "paper", "peer", "sgatlin"}))
      ->capture_default_str();
  cmd->add_option("--budget", options->budget,
                  "planned: spread by what each layer costs the model; uniform: the same fraction "
                  "everywhere")
      ->check(CLI::IsMember({"planned", "uniform"}))
      ->capture_default_str();
  cmd->add_option("--plan", options->plan,
                  "Follow this plan (an OUT.gguf.plan.json, edited or not)");
  cmd->add_option("--curves", options->curves,
                  "Plan from the curves measured for this plan, without measuring again");
  cmd->add_option("--tokens", convert_options.tokens, "Calibration tokens (default: the recipe's)")
      ->check(integer_between(1, std::int64_t{1} << 40));
  cmd->add_option("--experts", convert_options.n_experts,
                  "Experts of a layer. low-rank: more than the dense MLP's neurons make are clones "
                  "of these, for other tokens (default: none); paper, peer, sgatlin: a square for "
                  "product keys (default: the first from twice the dense MLP's neurons on)")
      ->check(integer_between(1, std::int64_t{1} << 24));
  cmd->add_option("--block", convert_options.block,
                  "Neurons of an expert of low-rank, contiguous; those that fire together")
      ->check(integer_between(1, std::int64_t{1} << 24))
      ->capture_default_str();
  cmd->add_option(
         "--passes", convert_options.passes,
         "Passes over the activations of paper, peer, sgatlin (default 3; the papers' 100)")
      ->check(finite_between(0.001, 1e6));
  cmd->add_option("--layers", options->layers,
                  "Layers that low-rank, paper, peer, sgatlin convert, as 3,5-8; the others stay "
                  "dense (default: all)")
      ->check(CLI::Validator(
          [](std::string& found) {
            return parse_layers(found) ? std::string()
                                       : fmt::format("found '{}', expected LAYER[-LAYER],…", found);
          },
          "LAYER[-LAYER],…"));
  cmd->add_flag("--resume", convert_options.resume, "Go on from what an interrupted run left");
  cmd->add_option("--expert-type", options->expert_type,
                  "Format of the experts (default: the dense MLP's own where it can be written)")
      ->check(CLI::IsMember(dtype_names()));
  cmd->add_option("--router-type", options->router_type, "Format of router and bypass")
      ->check(CLI::IsMember(dtype_names()));
  cmd->add_option("--seed", convert_options.seed, "Seed of everything that is drawn")
      ->check(integer_between(0, std::numeric_limits<std::int64_t>::max()))
      ->capture_default_str();
  add_recover_options(*cmd, convert_options.recover);
  options->run.activations = "f32";
  add_run_options(*cmd, options->run, Devices::CpuAndCuda);
  cmd->footer(
      R"(Leaves OUT.gguf, OUT.gguf.report.json, OUT.gguf.report.html and, for the first three recipes,
OUT.gguf.plan.json for --plan and --curves. While it runs, what is finished is kept in
OUT.gguf.state: after Ctrl-C or a crash, the same command with --resume goes on. The same seed and
thread count give the same file, byte for byte. With --device cuda calibration, measured losses, the
large products of the fits, the distillation of --recipe low-rank and the training of --recipe best
run on a GPU.

Examples:
  moesaic convert SmolLM2.gguf -o hybrid.gguf --data wiki.valid.tokens --active 0.5
  moesaic convert SmolLM2.gguf -o hybrid.gguf --data wiki.valid.tokens --recipe best
  moesaic convert SmolLM2.gguf -o peer.gguf --data wiki.valid.tokens --recipe peer --layers 5-20
  moesaic convert SmolLM2.gguf -o hybrid.gguf            (data-free: calibrates on its own samples)
  moesaic convert SmolLM2.gguf -o hybrid.gguf --data wiki.valid.tokens --resume)");
  cmd->callback([options, &action] { action = [options] { convert(*options); }; });
}

}  // namespace moesaic::tools
