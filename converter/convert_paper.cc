#include "converter/convert_paper.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "converter/layerwise.h"
#include "converter/study/layer_data.h"
#include "converter/study/pack_student.h"
#include "converter/study/train.h"

namespace moesaic::converter {
namespace {

constexpr double kPassCost = 1.7;  // per token and layer: attention, MLP, the stream moves on
constexpr double kUnit = 34000;    // ns of Schedule's unit

study::TrainOptions train_options(const Job& job, int layer) {
  const DistillOptions& d = job.recipe.distill;
  study::TrainOptions train;
  train.passes = job.options.passes > 0 ? job.options.passes : d.passes;
  train.batch = d.batch;
  train.rates = {d.learning_rate};
  train.seed = job.options.seed * 1000003 + static_cast<std::uint64_t>(layer);
  return train;
}

// Trained rows lie on no grid, and a coarser one is one more loss: Q8_0 where nothing was asked
// for.
DType expert_dtype(const Job& job, const study::StudentShape& s) {
  return format_for("--expert-type", job.options.expert_dtype, DType::Q8_0, {s.d_model});
}

DType router_dtype(const Job& job, const study::StudentShape& s) {
  const std::int64_t rank = s.router_rank > 0 ? s.router_rank : s.d_model;
  return format_for("--router-type", job.options.router_dtype, DType::Q8_0, {s.d_model, rank});
}

}  // namespace

study::StudentShape student_of(const Job& job, const models::ModelConfig& config) {
  const study::Family family = job.recipe.student;
  std::int64_t n_experts = job.options.n_experts;
  if (n_experts == 0) {
    // Twice the dense MLP's neurons, made a square.
    const auto m =
        static_cast<std::int64_t>(std::ceil(std::sqrt(2 * static_cast<double>(config.d_ff))));
    n_experts = m * m;
  }
  // Narrow layers (tests, toy models) get a rank that still leaves something to save.
  const std::int64_t rank =
      std::min(job.recipe.router_rank, std::max<std::int64_t>(8, config.d_model / 8));
  const auto paid = static_cast<std::int64_t>(job.options.active * 3 *
                                              static_cast<double>(config.d_model * config.d_ff));
  // Of one more selected neuron, shared partner and gate counted.
  study::StudentShape shape = study::student_shape(family, config.d_model, 2, n_experts, rank);
  const std::int64_t one = study::multiply_adds(shape);
  const std::int64_t step = 4 * config.d_model + 1;
  require<InputError>(one <= paid,
                      "--active: {} given, expected at least {:.3f}: less does not pay for the "
                      "router of {} experts and one neuron",
                      job.options.active,
                      static_cast<double>(one) / (3.0 * static_cast<double>(config.d_model) *
                                                  static_cast<double>(config.d_ff)),
                      n_experts);
  shape.n_active = std::min(n_experts, 1 + (paid - one) / step);
  shape.n_shared = shape.n_active;
  return shape;
}

void check_paper(const Job& job, const models::Checkpoint& checkpoint) {
  check_layerwise(job.options, checkpoint.config);
  const study::StudentShape shape = student_of(job, checkpoint.config);
  expert_dtype(job, shape);
  router_dtype(job, shape);
}

std::int64_t paper_memory(const Job& job, const models::ModelConfig& config) {
  const study::StudentShape s = student_of(job, config);
  const std::int64_t d = config.d_model;
  const std::int64_t parameters =
      2 * d * (s.n_shared + s.n_experts) + s.n_scores() * (s.router_rank > 0 ? s.router_rank : d);
  // The stream, inputs, outputs and the layer's own; the student, its gradient, moments, its best.
  return 4 * job.n_tokens * 4 * d + 4 * 5 * parameters +
         4 * job.recipe.distill.batch * (s.n_scores() + 6 * s.n_active + 2 * s.n_shared);
}

PaperConversion::PaperConversion(const Job& job, models::Transformer& model, StateFolder& state)
    : job_(job),
      model_(model),
      state_(state),
      shape_(student_of(job, model.config())),
      saved_(kept_layers(state, model.config())) {}

// Nanoseconds as in the study's ETA (study.cc).
double PaperConversion::train_cost() const {
  const auto d = static_cast<double>(shape_.d_model);
  const auto rank = static_cast<double>(shape_.router_rank);
  const auto n_scores = static_cast<double>(shape_.n_scores());
  const double parameters =
      2 * d * static_cast<double>(shape_.n_shared + shape_.n_experts) + n_scores * rank;
  const double per_token = n_scores * (0.95 + 0.007 * rank) +
                           0.08 * static_cast<double>(shape_.n_active) * (5 * d + 2 * rank) +
                           0.035 * d * static_cast<double>(shape_.n_shared);
  const study::TrainOptions train = train_options(job_, 0);
  const auto steps = static_cast<double>(study::train_steps(train, job_.n_tokens));
  return steps * (2.3 * parameters + static_cast<double>(train.batch) * per_token) / kUnit;
}

double PaperConversion::cost() const {
  const int n_layers = model_.config().n_layers;
  double trained = 0;
  for (int layer = static_cast<int>(saved_.size()); layer < n_layers; ++layer) {
    if (converts(job_.options, layer)) trained += train_cost();
  }
  return trained + kPassCost * static_cast<double>(job_.n_tokens) * n_layers;
}

SavedLayer PaperConversion::convert_layer(int layer, const Calibration& calibration, Stream& stream,
                                          Schedule& schedule, engine::Monitor& monitor) {
  Context& ctx = model_.context();
  const models::ModelConfig& config = model_.config();
  study::LayerData data;
  data.d_model = config.d_model;
  const auto n_values = static_cast<std::size_t>(stream.n_tokens() * config.d_model);
  data.x = AlignedBuffer<float>(n_values);
  data.y = AlignedBuffer<float>(n_values);
  const auto rows = [&](AlignedBuffer<float>& b) {
    return Matrix(b.data(), stream.n_tokens(), config.d_model);
  };
  stream.mlp_rows(layer, {.x = rows(data.x), .y = rows(data.y)});
  study::finish_layer(
      ctx, data, calibration.n_ctx,
      fmt::format("{}: layer {}", model_.checkpoint().file->path().string(), layer));

  const study::TrainOptions options = train_options(job_, layer);
  const std::string name = fmt::format("layer {}", layer);
  const double from = schedule.share();
  schedule.next(train_cost());
  const study::Trained trained =
      study::train(ctx, shape_, data, options, name, from, schedule.share(), monitor);
  require<InputError>(std::isfinite(trained.rate),
                      "layer {}: the training diverged at rate {:g}, expected a finite loss", layer,
                      job_.recipe.distill.learning_rate);
  const models::PackedMixture packed = study::pack(
      trained.student, data.y_scale, expert_dtype(job_, shape_), router_dtype(job_, shape_));
  const models::Mlp mlp = packed.view();

  LayerReport row;
  row.layer = layer;
  row.kind = models::kind_name(packed.kind);
  row.d_ff = config.d_ff;
  row.n_shared = packed.n_shared;
  row.n_experts = packed.n_experts;
  row.n_active = packed.n_active;
  row.router_rank = packed.router_rank;
  row.active_fraction =
      static_cast<double>(models::multiply_adds(mlp)) /
      (3.0 * static_cast<double>(config.d_model) * static_cast<double>(config.d_ff));
  row.error_closed_form = std::numeric_limits<double>::quiet_NaN();
  AlignedBuffer<float> own(n_values);
  run_counted(ctx, mlp, rows(data.x), rows(own), row.expert_usage);
  // In the outputs' unit, as the data's own.
  const std::int64_t first = data.n_fit + data.n_choose;
  AlignedBuffer<float> held_out(static_cast<std::size_t>(data.n_held_out() * config.d_model));
  std::transform(own.data() + first * config.d_model, own.data() + n_values, held_out.data(),
                 [&](float v) { return static_cast<float>(v / data.y_scale); });
  row.error_distilled =
      data.unexplained(first, {held_out.data(), data.n_held_out(), config.d_model}).all;
  stream.add_mlp_output(layer, rows(own));
  monitor.line(fmt::format("layer {:2}: active {:.3f} (k {} of {}), {:.4f} unexplained", layer,
                           row.active_fraction, row.n_active, row.n_experts, row.error_distilled));
  return state_.save_layer(row, packed, config);
}

std::vector<SavedLayer> PaperConversion::run(Passes& passes, const Calibration& calibration,
                                             Schedule& schedule, ConvertReport& report,
                                             engine::Monitor& monitor) {
  require<InputError>(calibration.n_windows() >= 3,
                      "the text gives {} windows of {} tokens, expected at least 3: to train on, "
                      "to choose and to judge",
                      calibration.n_windows(), calibration.n_ctx);
  const int n_layers = model_.config().n_layers;
  const double pass = kPassCost * static_cast<double>(job_.n_tokens);
  monitor.line(fmt::format(
      "each layer: {} shared neurons, {} of {} experts, {:.3f} of the dense MLP", shape_.n_shared,
      shape_.n_active, shape_.n_experts,
      static_cast<double>(study::multiply_adds(shape_)) /
          (3.0 * static_cast<double>(shape_.d_model) * static_cast<double>(model_.config().d_ff))));
  const auto n_kept = static_cast<int>(saved_.size());
  if (n_kept < n_layers) {
    const std::unique_ptr<Stream> stream = passes.stream(calibration.tokens, calibration.n_ctx);
    for (int layer = 0; layer < n_layers; ++layer) {
      monitor.check();
      schedule.next(pass);
      monitor.stage(fmt::format("layer {}: run the text", layer), 1);
      stream->attention(layer);
      const bool kept = layer < n_kept;
      if (!kept && converts(job_.options, layer)) {
        saved_.push_back(convert_layer(layer, calibration, *stream, schedule, monitor));
        continue;
      }
      if (!kept) {
        LayerReport row;
        row.layer = layer;
        row.kind = models::kKindDense;
        saved_.push_back(state_.save_dense_layer(row));
      }
      const auto& mlp = saved_[static_cast<std::size_t>(layer)].mlp;
      stream->mlp(layer, mlp ? *mlp : passes.own_mlp(layer));
    }
  }
  for (const SavedLayer& layer : saved_) {
    report.active_fraction += layer.report.active_fraction / n_layers;
  }
  return std::move(saved_);
}

}  // namespace moesaic::converter
