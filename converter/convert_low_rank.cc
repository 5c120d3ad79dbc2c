#include "converter/convert_low_rank.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "converter/distill.h"
#include "converter/fit.h"
#include "converter/layerwise.h"
#include "converter/linalg.h"
#include "converter/rows.h"
#include "converter/sensitivity.h"
#include "converter/start.h"
#include "converter/tiles.h"

namespace moesaic::converter {
namespace {

DType expert_dtype(const ConvertOptions& options, const models::DenseMlp& mlp) {
  return format_for("--expert-type", options.expert_dtype, mlp.w_gate.dtype, {mlp.w_gate.cols});
}

// Of router and bypass, whose rows are d_model or a rank long.
DType router_dtype(const ConvertOptions& options, const PlanShape& s) {
  return format_for("--router-type", options.router_dtype, DType::Q8_0,
                    {s.d_model, s.router_rank, s.bypass_rank});
}

std::string plan_to_json(std::span<const LayerPlan> plans, std::span<const double> sensitivity) {
  nlohmann::ordered_json j = nlohmann::ordered_json::array();
  for (std::size_t l = 0; l < plans.size(); ++l) {
    const LayerPlan& p = plans[l];
    j.push_back({{"layer", l},
                 {"dense", p.dense},
                 {"n_shared", p.n_shared},
                 {"n_active", p.n_active},
                 {"router_rank", p.router_rank},
                 {"bypass_rank", p.bypass_rank},
                 {"block", p.block},
                 {"n_clones", p.n_clones},
                 {"sensitivity", sensitivity[l]}});
  }
  return j.dump(1);
}

// Throws FormatError naming `file` if the text is not a plan of this many layers.
void plan_from_json(const std::string& text, const std::string& file, int n_layers,
                    std::vector<LayerPlan>& plans, std::vector<double>& sensitivity) {
  try {
    for (const auto& p : nlohmann::json::parse(text)) {
      plans.push_back({p.at("dense"), p.at("n_shared"), p.at("n_active"), p.at("router_rank"),
                       p.at("bypass_rank"), p.at("block"), p.at("n_clones")});
      sensitivity.push_back(p.at("sensitivity"));
    }
  } catch (const nlohmann::json::exception& e) {
    throw FormatError(fmt::format("{}: is no plan: {}", file, e.what()));
  }
  require<FormatError>(plans.size() == static_cast<std::size_t>(n_layers),
                       "{}: plans {} layers, expected {}", file, plans.size(), n_layers);
}

// Costs per token and layer, in a unit of their own: about 34 µs on SmolLM2-135M, two Zen 4 cores.
struct LayerCosts {
  double calibrate = 1;    // attention, the dense MLP
  double closed_form = 2;  // router, outputs, judging
  double distill = 0;      // all passes
  double refit = 1.5;      // rounding and outputs again
  double finish = 0.7;     // the hybrid's stream moves on

  explicit LayerCosts(const Job& job) : distill(3 * job.recipe.distill.passes) {
    if (distill == 0) refit = 0;
    // Clones are neurons more. Blocks are run token by token.
    const PlanShape& s = job.shape;
    const double neurons = 1 + static_cast<double>(s.n_clones * s.block) /
                                   static_cast<double>(std::max<std::int64_t>(1, s.d_ff));
    for (double* cost : {&closed_form, &distill, &refit}) *cost *= neurons;
    if (s.block > 1) finish *= 5;
  }
  double all() const { return calibrate + closed_form + distill + refit + finish; }
  double pass() const { return calibrate + finish; }  // converted before, or dense
};
constexpr double kSensitivityCost = 8;  // per token of its sample and layer
// The two residual streams of a conversion: of the dense model, and of the hybrid as far as it
// exists.
class Conversion {
 public:
  Conversion(const Job& job, Passes& passes, const Calibration& calibration)
      : job_(job),
        passes_(passes),
        model_(passes.model()),
        ctx_(model_.context()),
        dense_(passes.stream(calibration.tokens, calibration.n_ctx)),
        hybrid_(passes.stream(calibration.tokens, calibration.n_ctx)),
        n_(dense_->n_tokens()),
        d_(model_.config().d_model),
        n_fit_(n_ - std::max<std::int64_t>(1, calibration.n_windows() / 16) * calibration.n_ctx),
        r_(static_cast<std::size_t>(n_ * d_)),
        x_(r_.size()),
        y_(r_.size()),
        distillation_(job.options.device.distillation ? job.options.device.distillation()
                                                      : nullptr) {}

  // A layer that was converted before, or stays dense: both streams move on.
  void pass(int layer, const SavedLayer& saved) {
    dense_->attention(layer);
    dense_->mlp(layer, passes_.own_mlp(layer));
    hybrid_->attention(layer);
    if (!saved.mlp) {
      hybrid_->mlp(layer, passes_.own_mlp(layer));
    } else {
      hybrid_->mlp_rows(layer, {.x = x()});
      std::vector<float> usage;
      finish(layer, *saved.mlp, usage);
    }
  }

  // Fits, distills and packs the layer; the hybrid's stream stands before its MLP afterwards
  // (finish() moves it on), the dense one behind it.
  PackedStudent fit(int layer, const LayerPlan& plan, LayerReport& report, Schedule& schedule,
                    engine::Monitor& monitor) {
    const Recipe& recipe = job_.recipe;
    const LayerCosts costs(job_);
    const auto n_tokens = static_cast<double>(n_);
    const auto& mlp = std::get<models::DenseMlp>(passes_.own_mlp(layer));
    const DType experts = expert_dtype(job_.options, mlp);
    const DType router = router_dtype(job_.options, job_.shape);
    const std::string name = fmt::format("layer {}", layer);
    const auto stage = [&](const char* what, std::int64_t units, double cost) {
      monitor.check();
      schedule.next(n_tokens * cost);
      monitor.stage(fmt::format("{}: {}", name, what), units);
    };

    stage("calibrate", 1, costs.calibrate);
    dense_->attention(layer);
    hybrid_->attention(layer);
    hybrid_->mlp_rows(layer, {r(), x(), y()});
    const std::vector<float> weight = token_weights(model_, layer, r(), y());
    // What the hybrid must still gain to stand where the dense model stands, before this layer's
    // MLP adds to both. A norm behind the MLP hides magnitudes, so there the layer answers for its
    // own output alone.
    if (recipe.correction > 0 && !model_.config().post_norms) {
      add_drift(static_cast<float>(recipe.correction));
    }
    dense_->mlp(layer, mlp);
    const LayerSample sample{x(), y(), weight, n_fit_};
    const LayerSample held_out = sample.held_out();

    stage("closed form", 1, costs.closed_form);
    const Neurons teacher = unpack(
        mlp,
        fmt::format("{}: blk.{}", model_.checkpoint().file->path().filename().string(), layer));
    Student student = start_from_neurons(ctx_, teacher, sample, plan, recipe.router_ridge);
    // From here on the selection is the runtime's: it will have the router in its file format.
    const DMatrix metric = input_factor(ctx_, sample);
    round_inputs_to(ctx_, student, metric, experts, router);
    fit_outputs(ctx_, student, sample, recipe.router_ridge, recipe.output_ridge, experts);
    AlignedBuffer<float> y_hat(static_cast<std::size_t>(held_out.x.rows * d_));
    const Matrix mh(y_hat.data(), held_out.x.rows, d_);
    const auto held_out_error = [&](const PackedStudent& packed) {
      forward_rows(ctx_, view(packed), held_out.x, mh);
      return relative_error(held_out, mh);
    };
    PackedStudent packed = pack(student, experts, router);
    report.error_closed_form = report.error_distilled = held_out_error(packed);

    DistillOptions options = recipe.distill;
    options.seed = job_.options.seed * 1000003 + static_cast<std::uint64_t>(layer);
    const std::int64_t steps = distill_steps(options, n_fit_);
    if (steps == 0) return packed;
    stage("distill", steps, costs.distill);
    if (distillation_ != nullptr) {
      distillation_->distill(ctx_, student, sample, options, monitor);
    } else {
      distill(ctx_, student, sample, options, monitor);
    }
    // Round what the features depend on, then fit once more what comes after them: the rounding is
    // so made up for.
    stage("fit the outputs again", 1, costs.refit);
    round_inputs_to(ctx_, student, metric, experts, router);
    fit_outputs(ctx_, student, sample, recipe.router_ridge, recipe.output_ridge, experts);
    PackedStudent distilled = pack(student, experts, router);
    // Trained rows leave the grid of the checkpoint's own format, which can cost what a short
    // training gains: the held-out tokens decide.
    const double error = held_out_error(distilled);
    if (error < report.error_closed_form || std::isnan(report.error_closed_form)) {
      report.error_distilled = error;
      packed = std::move(distilled);
    }
    monitor.check();
    return packed;
  }

  // After fit(): moves the hybrid's stream over the converted layer, counting how often each expert
  // runs.
  void finish(int layer, const models::Mlp& mlp, std::vector<float>& usage) {
    run_counted(ctx_, mlp, x(), y(), usage);
    hybrid_->add_mlp_output(layer, y());
  }

 private:
  Matrix r() { return {r_.data(), n_, d_}; }
  Matrix x() { return {x_.data(), n_, d_}; }
  Matrix y() { return {y_.data(), n_, d_}; }

  // y += share · (dense r − hybrid r)
  void add_drift(float share) {
    for_tiles(ctx_, n_, [&](std::int64_t first, std::int64_t rows) {
      const Matrix dense = take(ctx_, rows, d_);
      dense_->read(first, dense);
      for_each_row(ctx_, rows, [&](std::int64_t t, int) {
        const float *from = dense.row(t), *hybrid = r().row(first + t);
        float* to = y().row(first + t);
        for (std::int64_t i = 0; i < d_; ++i) to[i] += share * (from[i] - hybrid[i]);
      });
    });
  }

  const Job& job_;
  Passes& passes_;
  models::Transformer& model_;
  Context& ctx_;
  std::unique_ptr<Stream> dense_, hybrid_;
  std::int64_t n_;
  std::int64_t d_;
  std::int64_t n_fit_;
  AlignedBuffer<float> r_;  // [n, d_model] the hybrid's stream before the MLP
  AlignedBuffer<float> x_;  // [n, d_model] its MLP inputs
  AlignedBuffer<float> y_;  // [n, d_model] outputs wanted, then the layer's own
  std::unique_ptr<DeviceDistillation> distillation_;  // or null: on the CPU
};

}  // namespace

PlanShape plan_shape(const models::ModelConfig& config, const Recipe& recipe,
                     const ConvertOptions& options) {
  PlanShape s;
  s.d_model = config.d_model;
  s.d_ff = config.d_ff;
  // Narrow layers (tests, toy models) get ranks that still leave something to save.
  const std::int64_t rank_limit = std::max<std::int64_t>(8, config.d_model / 8);
  s.router_rank = std::min(recipe.router_rank, rank_limit);
  s.bypass_rank = std::min(recipe.bypass_rank, rank_limit);
  const auto n =
      static_cast<std::int64_t>(recipe.shared_fraction * static_cast<double>(config.d_ff));
  s.n_shared = n < 32 ? n : (n + 16) / 32 * 32;
  s.block = options.block;
  const std::int64_t n_routed = s.d_ff - s.n_shared;
  require<InputError>(s.block >= 1 && n_routed % s.block == 0,
                      "--block: {} given, expected a divisor of {}, the {} neurons of a dense MLP "
                      "less the {} that are shared",
                      s.block, n_routed, s.d_ff, s.n_shared);
  if (options.n_experts > 0) {
    s.n_clones = options.n_experts - n_routed / s.block;
    require<InputError>(s.n_clones >= 0,
                        "--experts: {} given, expected at least {}: all {} neurons of a dense MLP "
                        "stay, {} of them shared, the others in experts of {}",
                        options.n_experts, n_routed / s.block, s.d_ff, s.n_shared, s.block);
  }
  return s;
}

void check_low_rank(const Job& job, const models::Checkpoint& checkpoint) {
  check_layerwise(job.options, checkpoint.config);
  if (job.options.active < 1) plan_for_fraction(job.shape, job.options.active);
  router_dtype(job.options, job.shape);
  for (const auto& layer : checkpoint.layers) {
    expert_dtype(job.options, std::get<models::DenseMlp>(layer.mlp));
  }
}

// Five [tokens, d_model] arrays, one tile's activations with their gradients, the normal equations,
// Adam's state.
std::int64_t low_rank_memory(const Job& job) {
  const std::int64_t d = job.shape.d_model;
  const std::int64_t n = job.shape.d_ff + job.shape.n_clones * job.shape.block;
  const std::int64_t f = n + d + 1;
  const std::int64_t streams = 4 * 5 * job.n_tokens * d;
  const std::int64_t tile = 4 * 2048 * (8 * n + 6 * d);
  const std::int64_t equations = (4 + 8 + 8) * f * f;
  const std::int64_t adam = 4 * 3 * n * d * 5;
  return streams + tile + equations + adam;
}

LowRankConversion::LowRankConversion(const Job& job, models::Transformer& model, StateFolder& state)
    : job_(job),
      model_(model),
      state_(state),
      kept_plan_(state.load_plan()),
      saved_(kept_layers(state, model.config())) {}

std::int64_t LowRankConversion::sensitivity_tokens() const {
  return std::min(job_.recipe.sensitivity_tokens, job_.n_tokens / 3);
}

std::vector<bool> LowRankConversion::wanted() const {
  std::vector<bool> out;
  for (int layer = 0; layer < model_.config().n_layers; ++layer) {
    out.push_back(converts(job_.options, layer));
  }
  return out;
}

double LowRankConversion::sensitivity_cost() const {
  if (kept_plan_ || job_.options.budget == Budget::Uniform) return 0;
  const std::vector<bool> layers = wanted();
  const auto n = static_cast<double>(std::count(layers.begin(), layers.end(), true));
  return static_cast<double>(sensitivity_tokens()) *
         (kSensitivityCost * n + LayerCosts(job_).calibrate * (model_.config().n_layers - n));
}

double LowRankConversion::cost() const {
  const LayerCosts costs(job_);
  const auto n_tokens = static_cast<double>(job_.n_tokens);
  double sum = sensitivity_cost();
  const std::vector<bool> layers = wanted();
  for (std::size_t l = 0; l < layers.size(); ++l) {
    sum += n_tokens * (layers[l] && l >= saved_.size() ? costs.all() : costs.pass());
  }
  return sum;
}

void LowRankConversion::make_plan(Passes& passes, const Calibration& calibration,
                                  Schedule& schedule, engine::Monitor& monitor,
                                  std::vector<LayerPlan>& plans, std::vector<double>& sensitivity) {
  const ConvertOptions& o = job_.options;
  const int n_layers = model_.config().n_layers;
  const std::vector<bool> layers = wanted();
  plans.assign(layers.size(), {.dense = true});
  sensitivity.assign(layers.size(), 0);
  if (o.budget == Budget::Uniform) {
    for (std::size_t l = 0; l < layers.size(); ++l) {
      if (layers[l]) plans[l] = plan_for_fraction(job_.shape, o.active);
    }
  } else {
    const std::int64_t windows = std::clamp<std::int64_t>(sensitivity_tokens() / calibration.n_ctx,
                                                          2, calibration.n_windows());
    schedule.next(sensitivity_cost());
    monitor.stage("measure the layers' sensitivity", n_layers);
    sensitivity = measure_sensitivity(
        passes,
        std::span(calibration.tokens).first(static_cast<std::size_t>(windows * calibration.n_ctx)),
        calibration.n_ctx, plan_for_fraction(job_.shape, std::min(o.active, 0.8)), layers,
        job_.recipe, monitor);
    std::vector<double> of_wanted;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      if (layers[l]) of_wanted.push_back(sensitivity[l]);
    }
    const std::vector<LayerPlan> allotted =
        allot(job_.shape, of_wanted, o.active, job_.recipe.least_fraction);
    auto next = allotted.begin();
    for (std::size_t l = 0; l < layers.size(); ++l) {
      if (layers[l]) plans[l] = *next++;
    }
  }
  state_.save_plan(plan_to_json(plans, sensitivity));
}

std::vector<SavedLayer> LowRankConversion::run(Passes& passes, const Calibration& calibration,
                                               Schedule& schedule, ConvertReport& report,
                                               engine::Monitor& monitor) {
  const int n_layers = model_.config().n_layers;
  const LayerCosts costs(job_);
  const auto n_kept = static_cast<double>(saved_.size());
  const auto n_tokens = static_cast<double>(job_.n_tokens);
  std::vector<LayerPlan> plans;
  std::vector<double> sensitivity;
  if (kept_plan_) {
    plan_from_json(*kept_plan_, (state_.path() / "plan.json").string(), n_layers, plans,
                   sensitivity);
  } else {
    make_plan(passes, calibration, schedule, monitor, plans, sensitivity);
  }
  for (const LayerPlan& plan : plans) {
    report.active_fraction += active_fraction(plan, job_.shape.d_model, job_.shape.d_ff) / n_layers;
  }
  const auto n_dense =
      std::count_if(plans.begin(), plans.end(), [](const LayerPlan& p) { return p.dense; });
  // Layers that the plan leaves dense though --layers asks for them.
  for (std::size_t l = saved_.size(); l < plans.size(); ++l) {
    if (plans[l].dense && converts(job_.options, static_cast<int>(l))) {
      schedule.drop(n_tokens * (costs.all() - costs.pass()));
    }
  }
  monitor.line(
      fmt::format("plan: mean active fraction {:.3f}, {} of {} layers converted, {} stay dense",
                  report.active_fraction, n_layers - n_dense, n_layers, n_dense));

  if (static_cast<int>(saved_.size()) < n_layers) {
    Conversion conversion(job_, passes, calibration);
    if (!saved_.empty()) {
      schedule.next(n_kept * n_tokens * costs.pass());
      monitor.stage("pass the layers kept from an earlier run",
                    static_cast<std::int64_t>(saved_.size()));
    }
    for (std::size_t l = 0; l < saved_.size(); ++l) {
      monitor.check();
      conversion.pass(static_cast<int>(l), saved_[l]);
      monitor.advance(static_cast<std::int64_t>(l) + 1, "");
    }
    for (int layer = static_cast<int>(saved_.size()); layer < n_layers; ++layer) {
      monitor.check();
      const LayerPlan& plan = plans[static_cast<std::size_t>(layer)];
      LayerReport row;
      row.layer = layer;
      row.active_fraction = active_fraction(plan, job_.shape.d_model, job_.shape.d_ff);
      row.sensitivity = sensitivity[static_cast<std::size_t>(layer)];
      if (plan.dense) {
        schedule.next(n_tokens * costs.pass());
        monitor.stage(fmt::format("layer {}: stays dense", layer), 1);
        row.kind = models::kKindDense;
        saved_.push_back(state_.save_dense_layer(row));
        conversion.pass(layer, saved_.back());
        continue;
      }
      row.kind = plan.block == 1 ? std::string(models::kKindGluLowRank) : models::kind_name({});
      row.d_ff = job_.shape.d_ff;
      row.n_shared = plan.n_shared;
      row.n_experts = n_experts(plan, job_.shape.d_ff);
      row.expert_neurons = plan.block;
      row.n_active = plan.n_active;
      row.router_rank = plan.router_rank;
      row.bypass_rank = plan.bypass_rank;
      const PackedStudent packed = conversion.fit(layer, plan, row, schedule, monitor);
      schedule.next(n_tokens * costs.finish);
      monitor.stage(fmt::format("layer {}: move on", layer), 1);
      conversion.finish(layer, view(packed), row.expert_usage);
      saved_.push_back(std::visit(
          [&](const auto& p) { return state_.save_layer(row, p, model_.config()); }, packed));
      monitor.line(fmt::format(
          "layer {:2}: active {:.3f} (k {} of {}{}), error {:.4f} closed form, {:.4f} distilled",
          layer, row.active_fraction, row.n_active, row.n_experts,
          plan.block == 1 ? "" : fmt::format(" blocks of {}", plan.block), row.error_closed_form,
          row.error_distilled));
    }
  }
  return std::move(saved_);
}

}  // namespace moesaic::converter
