#include "converter/study/study.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "converter/digest.h"
#include "converter/distill.h"
#include "converter/recipe.h"
#include "converter/study/published.h"
#include "converter/study/study_json.h"
#include "kernels/base/error.h"
#include "models/gguf_writer.h"
#include "models/tokenizer.h"

namespace moesaic::converter::study {
namespace {

constexpr std::int64_t kContext = 512;  // window length, as in calibration

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Results by name and everything that bears on them, a file each.
class KeptResults {
 public:
  KeptResults(std::filesystem::path folder, nlohmann::ordered_json job)
      : folder_(std::move(folder)), job_(std::move(job)) {
    if (folder_.empty()) return;
    std::error_code error;
    std::filesystem::create_directories(folder_, error);
    require<IoError>(!error, "{}: cannot create: {}", folder_.string(), error.message());
    models::check_writable(folder_ / "cell.json", 1 << 16);
  }

  std::filesystem::path path(const std::string& name, const nlohmann::ordered_json& part) const {
    const std::string text = job_.dump() + part.dump();
    const std::string digest = sha256(std::as_bytes(std::span(text)));
    return folder_ / fmt::format("{}-{}.json", name, digest.substr(0, 12));
  }

  std::optional<nlohmann::json> load(const std::filesystem::path& file) const {
    if (folder_.empty()) return std::nullopt;
    std::ifstream in(file);
    if (!in.good()) return std::nullopt;
    try {
      return nlohmann::json::parse(in);
    } catch (const nlohmann::json::exception& e) {
      throw FormatError(
          fmt::format("{}: is no kept result, remove it: {}", file.string(), e.what()));
    }
  }

  void save(const std::filesystem::path& file, const nlohmann::ordered_json& result) const {
    if (!folder_.empty()) models::write_file_atomically(file, result.dump(1) + "\n");
  }

 private:
  std::filesystem::path folder_;
  nlohmann::ordered_json job_;
};

// Expected times in nanoseconds on two Zen 4 cores, for the ETA. Measured on Gemma-3-270M.
double training_cost(const StudentShape& s, const TrainOptions& train, std::int64_t n_tokens) {
  const auto d = static_cast<double>(s.d_model);
  const auto m = static_cast<double>(s.n_experts);
  const double router = s.family == Family::LowRank    ? static_cast<double>(s.router_rank)
                        : s.family == Family::FullRank ? d
                                                       : 0;
  const auto shared = static_cast<double>(s.n_shared);
  const double parameters = 2 * d * (shared + m) + m * router;
  const auto k = static_cast<double>(s.n_active);
  const double per_token =
      m * (0.95 + 0.007 * router) + 0.08 * k * (5 * d + 2 * router) + 0.035 * d * shared;
  const auto batch = static_cast<double>(std::min(train.batch, n_tokens));
  return static_cast<double>(train.rates.size()) *
         static_cast<double>(train_steps(train, n_tokens)) * (2.3 * parameters + batch * per_token);
}

double own_cost(std::int64_t d_model, std::int64_t d_ff, double passes, std::int64_t n_tokens) {
  return 0.04 * (3 + 3 * passes) * static_cast<double>(d_model * d_ff * n_tokens);
}

double collect_cost(int layer, std::int64_t d_model, std::int64_t d_ff, std::int64_t n_tokens) {
  return 0.04 * static_cast<double>(layer + 1) * static_cast<double>(d_model * d_ff * n_tokens);
}

// Bytes at the peak: inputs and outputs of both kinds and the residual stream; the largest student
// with gradient, moments, the best one so far and its scores; the normal equations of our own
// start.
std::int64_t memory_bytes(const std::vector<Cell>& cells, const StudyOptions& options,
                          std::int64_t n_tokens, std::int64_t d_model, std::int64_t d_ff) {
  std::int64_t student = 0;
  for (const Cell& cell : cells) {
    const StudentShape& s = cell.shape;
    const std::int64_t router = s.family == Family::FullRank ? d_model : s.router_rank;
    const std::int64_t parameters = 2 * d_model * (s.n_shared + s.n_experts) + s.n_experts * router;
    student = std::max(student, 5 * parameters + options.train.batch * s.n_experts);
  }
  const bool gaussian = std::find(options.inputs.begin(), options.inputs.end(), Inputs::Gaussian) !=
                        options.inputs.end();
  const std::int64_t f = d_ff + d_model + 1;
  const std::int64_t equations = options.own_passes < 0 ? 0 : (4 + 8 + 8) * f * f;
  return 4 * n_tokens * d_model * (gaussian ? 4 : 3) + 4 * student + equations +
         (std::int64_t{200} << 20);
}

// Shares of the job for its ETA.
class Shares {
 public:
  explicit Shares(double total) : total_(total) {}
  double done() const { return std::min(1.0, done_ / total_); }
  double after(double cost) const { return std::min(1.0, (done_ + cost) / total_); }
  void finish(double cost) { done_ += cost; }
  void drop(double cost) { total_ -= cost; }  // turned out not to be needed

 private:
  double total_;
  double done_ = 0;
};

std::string describe(const Unexplained& u, Inputs inputs) {
  return inputs == Inputs::Real
             ? fmt::format("{:.4f} ({:.4f} without sinks)", u.all, u.without_sinks)
             : fmt::format("{:.4f}", u.all);
}

std::string cell_name(const Cell& cell) {
  return fmt::format("{}-{}-{}", inputs_name(cell.inputs), family_name(cell.shape.family),
                     cell.n_neurons);
}

double sink_share(const LayerData& data) {
  const std::int64_t first = data.n_fit + data.n_choose;
  const std::int64_t d = data.d_model;
  std::vector<double> mean(static_cast<std::size_t>(d));
  for (std::int64_t t = first; t < data.n_tokens(); ++t) {
    for (std::int64_t j = 0; j < d; ++j) {
      mean[static_cast<std::size_t>(j)] +=
          data.outputs().row(t)[j] / static_cast<double>(data.n_held_out());
    }
  }
  double all = 0;
  double sinks = 0;
  for (std::int64_t t = first; t < data.n_tokens(); ++t) {
    double sum = 0;
    for (std::int64_t j = 0; j < d; ++j) {
      const double gap = data.outputs().row(t)[j] - mean[static_cast<std::size_t>(j)];
      sum += gap * gap;
    }
    all += sum;
    if (data.sink[static_cast<std::size_t>(t)]) sinks += sum;
  }
  return sinks / all;
}

// The cells of one kind of inputs.
class Runner {
 public:
  Runner(const StudyOptions& options, const KeptResults& kept, const models::DenseMlp& mlp,
         const Neurons& teacher, Context& ctx, Shares& shares, engine::Monitor& monitor)
      : options_(options),
        kept_(kept),
        d_ff_(mlp.w_gate.rows),
        teacher_(teacher),
        ctx_(ctx),
        shares_(shares),
        monitor_(monitor) {}

  CellResult run(const Cell& cell, const LayerData& data) {
    CellResult result;
    result.cell = cell;
    const std::int64_t cost = multiply_adds(cell.shape);
    result.active_fraction = static_cast<double>(cost) /
                             (3.0 * static_cast<double>(data.d_model) * static_cast<double>(d_ff_));
    const std::string name = cell_name(cell);
    const StudentShape& s = cell.shape;
    const double expected = training_cost(s, options_.train, data.n_tokens());
    const auto file = kept_.path(name, {s.n_shared, s.n_experts, s.n_active, s.router_rank});
    if (const auto found = kept_.load(file)) {
      shares_.drop(expected);
      read_cell(*found, file.string(), result);
      monitor_.line(fmt::format("{}: kept from an earlier run: {}", name,
                                describe(result.held_out, cell.inputs)));
    } else {
      const auto start = Clock::now();
      const Trained trained = train(ctx_, s, data, options_.train, name, shares_.done(),
                                    shares_.after(expected), monitor_);
      result.rate = trained.rate;
      result.by_rate = trained.by_rate;
      constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
      result.held_out =
          std::isfinite(trained.rate)
              ? judge(ctx_, trained.student, data, data.n_fit + data.n_choose, data.n_held_out())
              : Unexplained{kNan, kNan};
      result.seconds = seconds_since(start);
      shares_.finish(expected);
      kept_.save(file, to_json(result));
      monitor_.line(fmt::format("{}: {} at rate {:g}", name, describe(result.held_out, cell.inputs),
                                result.rate));
    }
    result.own = own(cell.inputs, own_plan(data.d_model, d_ff_, cost), data);
    return result;
  }

 private:
  // Rows of equal cost share one.
  std::optional<OwnStart> own(Inputs inputs, const std::optional<LayerPlan>& plan,
                              const LayerData& data) {
    if (!plan || options_.own_passes < 0) return std::nullopt;
    const double expected = own_cost(data.d_model, d_ff_, options_.own_passes, data.n_tokens());
    for (const OwnStart& o : starts_) {
      if (o.plan.n_shared == plan->n_shared && o.plan.n_active == plan->n_active &&
          o.plan.router_rank == plan->router_rank && o.plan.bypass_rank == plan->bypass_rank) {
        shares_.drop(expected);
        return o;
      }
    }
    const std::string name = fmt::format("{}-own-{}-{}-{}-{}", inputs_name(inputs), plan->n_shared,
                                         plan->n_active, plan->router_rank, plan->bypass_rank);
    const auto file = kept_.path(name, {options_.own_passes});
    if (const auto found = kept_.load(file)) {
      shares_.drop(expected);
      starts_.push_back(read_own(*found, file.string()));
      return starts_.back();
    }
    monitor_.job(shares_.done(), shares_.after(expected));
    DistillOptions distill = find_recipe("low-rank").distill;
    distill.passes = options_.own_passes;
    monitor_.stage(name, std::max<std::int64_t>(1, distill_steps(distill, data.n_fit)));
    starts_.push_back(
        own_start(ctx_, teacher_, data, *plan, options_.own_passes, options_.train.seed, monitor_));
    shares_.finish(expected);
    const OwnStart& o = starts_.back();
    kept_.save(file, to_json(o));
    monitor_.line(fmt::format(
        "{}: {} in closed form{}", name, describe(o.closed_form, inputs),
        o.distilled ? fmt::format(", {} distilled", describe(*o.distilled, inputs)) : ""));
    return o;
  }

  const StudyOptions& options_;
  const KeptResults& kept_;
  std::int64_t d_ff_;
  const Neurons& teacher_;
  Context& ctx_;
  Shares& shares_;
  engine::Monitor& monitor_;
  std::vector<OwnStart> starts_;
};

void check(const StudyOptions& o) {
  require<InputError>(!o.inputs.empty() && !o.families.empty() && !o.active_neurons.empty(),
                      "nothing to study: no inputs, families or active neurons");
  require<InputError>(!o.train.rates.empty(), "--rates: none given");
  for (const double rate : o.train.rates) {
    require<InputError>(std::isfinite(rate) && rate > 0, "--rates: {} given, expected above 0",
                        rate);
  }
  require<InputError>(std::isfinite(o.train.passes) && o.train.passes > 0,
                      "--passes: {} given, expected above 0", o.train.passes);
  require<InputError>(o.train.batch >= 1, "--batch: {} given, expected at least 1", o.train.batch);
  require<InputError>(o.own_passes <= 3, "--own-passes: {} given, expected at most 3",
                      o.own_passes);
}

}  // namespace

std::vector<Cell> study_cells(const StudyOptions& options, std::int64_t d_model) {
  check(options);
  std::vector<std::int64_t> neurons = options.active_neurons;
  std::sort(neurons.begin(), neurons.end());
  std::vector<Cell> cells;
  for (const Inputs inputs : options.inputs) {
    for (const Family family : options.families) {
      for (const std::int64_t n : neurons) {
        const Cell cell{inputs, n,
                        student_shape(family, d_model, n, options.n_experts, options.router_rank)};
        if (std::find(cells.begin(), cells.end(), cell) == cells.end()) cells.push_back(cell);
      }
    }
  }
  return cells;
}

StudyReport run_study(const StudyOptions& options, Context& ctx, engine::Monitor& monitor) {
  const auto start = Clock::now();
  const auto checkpoint = models::Checkpoint::load(options.model);
  const models::ModelConfig& config = checkpoint->config;
  require<InputError>(options.layer >= 0 && options.layer < config.n_layers,
                      "--layer: {} given, {} has layers 0 to {}", options.layer,
                      options.model.string(), config.n_layers - 1);
  const models::Mlp& form = checkpoint->layers[static_cast<std::size_t>(options.layer)].mlp;
  const auto* mlp = std::get_if<models::DenseMlp>(&form);
  require<InputError>(mlp != nullptr,
                      "--layer: layer {} of {} was converted already, expected a dense one",
                      options.layer, options.model.string());
  const std::vector<Cell> cells = study_cells(options, config.d_model);

  StudyReport report;
  report.model = options.model.string();
  report.name = config.name;
  report.data = options.data.string();
  report.layer = options.layer;
  report.d_model = config.d_model;
  report.d_ff = config.d_ff;
  report.options = options;
  report.activations = ctx.activations == Activations::BF16 ? "bf16" : "f32";
  report.n_threads = ctx.pool.n_threads();

  const auto tokenizer = models::load_tokenizer(*checkpoint->file);
  const Calibration text = load_calibration(
      options.data, *tokenizer, std::min(kContext, config.context_length), options.tokens);
  report.data_digest = text.digest;
  monitor.stage("read the checkpoint", 1);
  report.source_digest = sha256_file(options.model);
  const TrainOptions& train = options.train;
  const KeptResults kept(options.resume, {{"program", "moesaic " MOESAIC_VERSION},
                                          {"source_digest", report.source_digest},
                                          {"data_digest", report.data_digest},
                                          {"layer", options.layer},
                                          {"passes", train.passes},
                                          {"batch", train.batch},
                                          {"rates", train.rates},
                                          {"seed", train.seed},
                                          {"activations", report.activations},
                                          {"threads", report.n_threads}});

  const auto n_tokens = static_cast<std::int64_t>(text.tokens.size());
  const double collecting = collect_cost(options.layer, config.d_model, config.d_ff, n_tokens);
  double total = collecting;
  for (const Cell& cell : cells) {
    total += training_cost(cell.shape, train, n_tokens);
    if (options.own_passes >= 0 &&
        own_plan(config.d_model, config.d_ff, multiply_adds(cell.shape))) {
      total += own_cost(config.d_model, config.d_ff, options.own_passes, n_tokens);
    }
  }
  Shares shares(total);
  monitor.line(fmt::format(
      "needs about {:.1f} GB of memory",
      static_cast<double>(memory_bytes(cells, options, n_tokens, config.d_model, config.d_ff) +
                          checkpoint->file->file_bytes()) /
          1e9));
  models::Transformer model(checkpoint, ctx);
  monitor.job(0, shares.after(collecting));
  monitor.stage("collect activations", std::max(1, options.layer));
  LayerData data = collect_layer(model, text, options.layer, monitor);
  shares.finish(collecting);
  report.n_tokens = data.n_tokens();
  report.n_fit = data.n_fit;
  report.n_choose = data.n_choose;
  report.n_held_out = data.n_held_out();
  report.n_sinks = data.n_sinks(0, data.n_tokens());
  report.n_held_out_sinks = data.n_sinks(data.n_fit + data.n_choose, data.n_held_out());
  report.sink_share = sink_share(data);
  monitor.line(fmt::format(
      "{} tokens: {} to train on, {} to choose the rate, {} held out to judge; {} of these are "
      "sinks and make up {:.1f} % of the variance",
      report.n_tokens, report.n_fit, report.n_choose, report.n_held_out, report.n_held_out_sinks,
      100 * report.sink_share));
  const double minutes = total / 6e10;
  monitor.line(fmt::format("{} students at {} rates, about {:.1f} {} on two Zen 4 cores of its own",
                           cells.size(), train.rates.size(), minutes < 90 ? minutes : minutes / 60,
                           minutes < 90 ? "min" : "h"));

  const Neurons teacher =
      unpack(*mlp, fmt::format("{}: blk.{}", options.model.string(), options.layer));
  for (const Inputs inputs : options.inputs) {
    LayerData drawn;
    if (inputs == Inputs::Gaussian) {
      monitor.job(shares.done(), shares.done());
      monitor.stage("draw Gaussian inputs", 1);
      drawn = gaussian_layer(ctx, form, data, train.seed + 1);
    }
    Runner runner(options, kept, *mlp, teacher, ctx, shares, monitor);
    for (const Cell& cell : cells) {
      if (cell.inputs != inputs) continue;
      monitor.check();
      report.cells.push_back(runner.run(cell, inputs == Inputs::Gaussian ? drawn : data));
      if (has_published_rows(config.architecture, config.n_layers, config.d_model, options.layer)) {
        report.cells.back().published = published(inputs, cell.shape.family, cell.n_neurons);
      }
    }
  }
  report.seconds = seconds_since(start);
  return report;
}

}  // namespace moesaic::converter::study
