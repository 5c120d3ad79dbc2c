#include "converter/convert.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <nlohmann/json.hpp>

#include "converter/assemble.h"
#include "converter/convert_low_rank.h"
#include "converter/convert_paper.h"
#include "converter/convert_self_routed.h"
#include "converter/data.h"
#include "converter/digest.h"
#include "converter/job.h"
#include "converter/recovery/recover_file.h"
#include "converter/report.h"
#include "converter/state.h"
#include "converter/stream.h"
#include "models/expert_usage.h"
#include "models/gguf_writer.h"
#include "models/mixture_file.h"
#include "models/self_routed_file.h"
#include "models/tokenizer.h"
#include "models/transformer.h"

namespace moesaic::converter {
namespace {

constexpr std::int64_t kContext = 512;  // window length of calibration

std::int64_t peak_memory_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::int64_t>(usage.ru_maxrss) * 1024;
}

// Name and numbers: layers of a program with other numbers are not taken over.
nlohmann::ordered_json to_json(const Recipe& r) {
  return {{"name", r.name},
          {"sensitivity_tokens", r.sensitivity_tokens},
          {"shared_fraction", r.shared_fraction},
          {"router_rank", r.router_rank},
          {"bypass_rank", r.bypass_rank},
          {"router_ridge", r.router_ridge},
          {"output_ridge", r.output_ridge},
          {"correction", r.correction},
          {"least_fraction", r.least_fraction},
          {"passes", r.distill.passes},
          {"batch", r.distill.batch},
          {"learning_rate", r.distill.learning_rate},
          {"distill_router_rate", r.distill.router_rate},
          {"auxiliary", r.distill.auxiliary}};
}

nlohmann::ordered_json fingerprint(const Job& job, int n_threads, const std::string& source_digest,
                                   const std::string& data_digest) {
  const ConvertOptions& o = job.options;
  nlohmann::ordered_json j;
  j["program"] = "moesaic " MOESAIC_VERSION;
  j["source_digest"] = source_digest;
  j["data"] = o.data == "self" ? "self" : data_digest;
  j["recipe"] = to_json(job.recipe);
  j["active"] = o.active;
  j["budget"] = o.budget == Budget::Planned ? "planned" : "uniform";
  if (!o.plan.empty()) j["plan"] = sha256_file(o.plan);
  if (!o.curves.empty()) j["curves"] = sha256_file(o.curves);
  j["tokens"] = job.n_tokens;
  j["seed"] = o.seed;
  j["threads"] = n_threads;
  if (o.device.passes) j["device"] = "cuda";  // other roundings: another conversion
  j["expert_type"] = o.expert_dtype ? std::string(traits(*o.expert_dtype).name) : "auto";
  j["router_type"] = o.router_dtype ? std::string(traits(*o.router_dtype).name) : "auto";
  if (job.recipe.method == Method::Paper || job.recipe.method == Method::LowRank) {
    j["experts"] = o.n_experts;
    j["block"] = o.block;
    j["passes"] = o.passes;
    j["layers"] = o.layers;
  }
  if (job.recover.tokens > 0) {
    j["recover"] = nlohmann::ordered_json::parse(options_json(job.recover));
  }
  return j;
}

constexpr double kSampleCost = 57;   // per token that the model draws
constexpr double kRecoverCost = 90;  // per token that recovery trains on

// Bytes at the peak: while converting; while sampling, cache and logits; and always the
// checkpoint's own pages.
std::int64_t estimate_memory(const Job& job, const models::Checkpoint& checkpoint,
                             std::int64_t n_ctx) {
  std::int64_t converting = 0;
  switch (job.recipe.method) {
    case Method::LowRank:
      converting = low_rank_memory(job);
      break;
    case Method::Paper:
      converting = paper_memory(job, checkpoint.config);
      break;
    case Method::SelfRouted:
    case Method::Threshold:
      converting = self_routed_memory(job, checkpoint.config);
  }
  const std::int64_t sampling = job.options.data == "self"
                                    ? sampling_bytes(checkpoint.config.shape(), n_ctx, job.n_tokens)
                                    : 0;
  return std::max(converting, sampling) + checkpoint.file->file_bytes() + (std::int64_t{200} << 20);
}

// What a recovery changes in the report: shares and active fraction, and how often experts fire in
// the hybrid as written, on the calibration text.
void report_recovered(const Recovered& recovered, const std::filesystem::path& output,
                      const Calibration& calibration, Context& ctx, ConvertReport& report,
                      engine::Monitor& monitor) {
  for (const auto& [layer, packed] : recovered.layers) {
    const auto* routed = std::get_if<models::PackedSelfRouted>(&packed);
    if (routed == nullptr) continue;
    LayerReport& row = report.layers[static_cast<std::size_t>(layer)];
    row.shares = {routed->input_share, routed->gate_share, routed->hidden_share};
    row.active_fraction = active_fraction(row.shares, routed->up_by_input);
  }
  report.active_fraction = recovered.active_fraction;
  models::Transformer model(models::Checkpoint::load(output), ctx);
  const models::ExpertUsage usage =
      models::count_experts(model, calibration.tokens, calibration.n_ctx, monitor);
  for (LayerReport& row : report.layers) {
    const auto& counts = usage.counts[static_cast<std::size_t>(row.layer)];
    row.expert_usage.assign(counts.begin(), counts.end());
    for (float& v : row.expert_usage) v /= static_cast<float>(usage.n_tokens);
  }
  report.recovery = recovered.report;
}

std::unique_ptr<Passes> make_passes(const ConverterDevice& device, models::Transformer& model,
                                    std::int64_t n_ctx) {
  if (device.passes) return device.passes(model, n_ctx);
  return std::make_unique<HostPasses>(model);
}

// Bytes of the files in a folder; 0 where there is none.
std::int64_t folder_bytes(const std::filesystem::path& folder) {
  std::int64_t bytes = 0;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    if (const auto size = entry.file_size(error); !error) bytes += static_cast<std::int64_t>(size);
  }
  return bytes;
}

}  // namespace

bool is_mixture(const LayerReport& layer) {
  // Gated experts are the dense MLP's own neurons, in blocks.
  const auto kind = models::mixture_kind(layer.kind);
  return kind && kind->expert != kernels::ExpertKind::Glu;
}

bool is_self_routed(const LayerReport& layer) {
  return layer.kind == models::kKindGluGate || layer.kind == models::kKindGluInput;
}

ConvertReport convert(const ConvertOptions& options, Context& caller_ctx,
                      engine::Monitor& monitor) {
  const auto start = std::chrono::steady_clock::now();
  const auto seconds_so_far = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  require<InputError>(options.active > 0 && options.active <= 1,
                      "--active: {} given, expected a fraction above 0 and at most 1",
                      options.active);
  const Recipe& recipe = find_recipe(options.recipe);
  const std::unique_ptr<kernels::Products> products =
      options.device.products ? options.device.products() : nullptr;
  Context ctx = caller_ctx.with(Activations::BF16);
  ctx.products = products.get();

  const auto checkpoint = models::Checkpoint::load(options.model);
  require<InputError>(!models::is_hybrid(*checkpoint->file),
                      "{}: is a hybrid already, expected a dense checkpoint",
                      options.model.string());
  const auto tokenizer = models::load_tokenizer(*checkpoint->file);
  Job job{
      options, recipe, options.tokens > 0 ? options.tokens : recipe.tokens, {}, options.recover};
  require<InputError>(recipe.recover_tokens > 0 || options.recover.tokens == 0,
                      "--recover-tokens: the recipe \"{}\" does not recover, \"best\" does",
                      recipe.name);
  if (job.recover.tokens == 0) job.recover.tokens = recipe.recover_tokens;
  job.recover.seed = options.seed;
  job.recover.device = options.device.training;
  job.recover.expert_type = options.expert_dtype;
  job.recover.n_ctx = std::min(kContext, checkpoint->config.context_length);
  // What no other recipe reads must not be passed over in silence.
  const auto only = [&](bool given, bool used, std::string_view flag) {
    require<InputError>(!given || used, "{}: the recipe \"{}\" makes no use of it", flag,
                        recipe.name);
  };
  const bool low_rank = recipe.method == Method::LowRank;
  const bool paper = recipe.method == Method::Paper;
  only(options.n_experts > 0, low_rank || paper, "--experts");
  only(!options.layers.empty(), low_rank || paper, "--layers");
  only(options.block != 1, low_rank, "--block");
  only(options.passes > 0, paper, "--passes");
  if (low_rank) job.shape = plan_shape(checkpoint->config, recipe, options);
  switch (recipe.method) {
    case Method::LowRank:
      check_low_rank(job, *checkpoint);
      break;
    case Method::Paper:
      check_paper(job, *checkpoint);
      break;
    case Method::SelfRouted:
    case Method::Threshold:
      check_self_routed(job);
  }

  Calibration calibration;
  calibration.n_ctx = std::min(kContext, checkpoint->config.context_length);
  if (options.data != "self") {
    calibration = load_calibration(options.data, *tokenizer, calibration.n_ctx, job.n_tokens);
    job.n_tokens = static_cast<std::int64_t>(calibration.tokens.size());
  } else {
    job.n_tokens = std::max<std::int64_t>(2, job.n_tokens / calibration.n_ctx) * calibration.n_ctx;
  }
  // The output, and the layers kept for --resume, as far as they are not there yet.
  const std::int64_t output_bytes =
      estimate_output_bytes(*checkpoint->file, options.expert_dtype, options.router_dtype,
                            job.shape.n_clones * job.shape.block);
  const std::int64_t kept_bytes =
      options.resume ? folder_bytes(options.output.string() + ".state") : 0;
  const std::int64_t disk = output_bytes + std::max<std::int64_t>(0, output_bytes - kept_bytes);
  monitor.line(
      fmt::format("needs about {:.1f} GB of memory and {:.1f} GB of disk ({} calibration tokens)",
                  static_cast<double>(estimate_memory(job, *checkpoint, calibration.n_ctx)) / 1e9,
                  static_cast<double>(disk) / 1e9, job.n_tokens));
  models::check_writable(options.output, disk);

  monitor.stage("read the checkpoint", 1);
  ConvertReport report;
  report.source_digest = sha256_file(options.model);
  const int n_threads = ctx.pool.n_threads();
  StateFolder state(options.output,
                    fingerprint(job, n_threads, report.source_digest, calibration.digest).dump(1),
                    options.resume);
  // Whatever ends this run, the next one that resumes knows how long it took.
  struct AddSeconds {
    StateFolder& state;
    const std::function<double()> seconds;
    bool done = false;
    ~AddSeconds() {
      if (done) return;
      try {
        state.add_seconds(seconds());
      } catch (const Error&) {  // a full disk must not hide the error that is on its way
      }
    }
  } add_seconds{state, seconds_so_far};

  models::Transformer model(checkpoint, ctx);
  std::optional<std::vector<std::int32_t>> kept_tokens;
  if (options.data == "self") kept_tokens = state.load_calibration();
  const bool sample = options.data == "self" && !kept_tokens;
  const double sample_cost = sample ? kSampleCost * static_cast<double>(job.n_tokens) : 0;
  const bool recovers = job.recover.tokens > 0;
  const double recover_cost =
      recovers ? kRecoverCost * static_cast<double>(job.recover.tokens + job.recover.scale_tokens)
               : 0;
  std::optional<LowRankConversion> to_low_rank;
  std::optional<PaperConversion> to_paper;
  std::optional<SelfRoutedConversion> to_self_routed;
  double convert_cost = 0;
  switch (recipe.method) {
    case Method::LowRank:
      convert_cost = to_low_rank.emplace(job, model, state).cost();
      break;
    case Method::Paper:
      convert_cost = to_paper.emplace(job, model, state).cost();
      break;
    case Method::SelfRouted:
    case Method::Threshold:
      convert_cost = to_self_routed.emplace(job, model, state).cost();
  }
  Schedule schedule(monitor, sample_cost + recover_cost + convert_cost);

  if (options.data == "self") {
    if (kept_tokens) {
      calibration.tokens = std::move(*kept_tokens);
    } else {
      schedule.next(sample_cost);
      const auto decoder = options.device.decoder ? options.device.decoder(checkpoint) : nullptr;
      calibration = sample_calibration(model, *tokenizer, calibration.n_ctx, job.n_tokens,
                                       options.seed, monitor, decoder.get());
      state.save_calibration(calibration.tokens);
    }
    calibration.digest = sha256(std::as_bytes(std::span(calibration.tokens)));
  }
  report.data_digest = calibration.digest;
  report.n_tokens = static_cast<std::int64_t>(calibration.tokens.size());

  std::unique_ptr<Passes> passes = make_passes(options.device, model, calibration.n_ctx);
  const std::filesystem::path converted = recovers ? state.hybrid_path() : options.output;
  if (!to_self_routed) {
    const std::vector<SavedLayer> layers =
        to_paper ? to_paper->run(*passes, calibration, schedule, report, monitor)
                 : to_low_rank->run(*passes, calibration, schedule, report, monitor);
    for (const SavedLayer& layer : layers) report.layers.push_back(layer.report);
    monitor.stage("write the hybrid", 1);
    assemble(*checkpoint->file, layers, options, report, converted);
  } else {
    to_self_routed->run(*passes, calibration, schedule, report, converted, monitor);
    models::write_file_atomically(options.output.string() + ".plan.json",
                                  plan_json(to_self_routed->plan()));
  }
  passes.reset();  // its memory is the recovery's
  if (recovers) {
    schedule.next(recover_cost);
    const auto hybrid = models::Checkpoint::load(state.hybrid_path());
    const std::vector<std::int32_t> text =
        recovery_text(options.data, job.recover, checkpoint, *tokenizer, options.device.decoder,
                      state, ctx, monitor);
    const Recovered recovered = recover(checkpoint, hybrid, text, job.recover,
                                        {state.training_path(), state.scales_path()}, ctx, monitor);
    monitor.stage("write the hybrid", 1);
    write_recovered(*hybrid->file, recovered, options.output);
    report_recovered(recovered, options.output, calibration, ctx, report, monitor);
  }
  report.seconds = state.seconds() + seconds_so_far();
  report.peak_memory_bytes = peak_memory_bytes();
  models::write_file_atomically(options.output.string() + ".report.json",
                                report_json(options, report));
  models::write_file_atomically(options.output.string() + ".report.html",
                                report_html(options, report));
  add_seconds.done = true;
  state.remove();
  return report;
}

}  // namespace moesaic::converter
