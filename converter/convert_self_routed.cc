#include "converter/convert_self_routed.h"

#include <algorithm>
#include <sstream>
#include <string>

#include "converter/recovery/pack_matrix.h"
#include "converter/self_routed/apply_plan.h"
#include "converter/self_routed/curves.h"

namespace moesaic::converter {
namespace {

// Costs in the unit of Schedule.
constexpr double kPathCost = 60000;    // per layer
constexpr double kMeasureCost = 3;     // per judging token, layer and layer behind it
constexpr double kThresholdsCost = 4;  // per token and layer

}  // namespace

void check_self_routed(const Job& job) {
  const ConvertOptions& o = job.options;
  const std::string& name = o.recipe;
  const bool planned = job.recipe.method == Method::SelfRouted;
  require<InputError>(planned || (o.plan.empty() && o.curves.empty()),
                      "--{}: the recipe \"{}\" makes no use of a plan",
                      o.plan.empty() ? "curves" : "plan", name);
  require<InputError>(o.plan.empty() || o.curves.empty(),
                      "--plan and --curves: expected one of them");
  require<InputError>(job.recover.tokens > 0 || !o.expert_dtype,
                      "--expert-type: the recipe \"{}\" keeps the dense weights as they are", name);
  for (const std::int64_t cols : {job.shape.d_model, job.shape.d_ff}) {
    writable_type(DType::F32, o.expert_dtype, cols);
  }
  require<InputError>(!o.router_dtype, "--router-type: the recipe \"{}\" has no router of its own",
                      name);
}

std::int64_t self_routed_memory(const Job& job, const models::ModelConfig& config) {
  const std::int64_t d = config.d_model, d_ff = config.d_ff;
  // The streams, a layer's inputs and outputs; three [tokens, d_ff] of thresholds, the teacher.
  return 4 * job.n_tokens * (6 * d + 3 * d_ff) + 4 * 3 * d * d_ff;
}

SelfRoutedConversion::SelfRoutedConversion(const Job& job, models::Transformer& model,
                                           StateFolder& state)
    : job_(job), model_(model), state_(state) {
  const ConvertOptions& o = job.options;
  const int n_layers = model.config().n_layers;
  if (!o.plan.empty()) {
    plan_ = read_plan(o.plan, n_layers);
  } else if (const auto kept = state.load_plan()) {
    plan_ = parse_plan(*kept, (state.path() / "plan.json").string(), n_layers);
  } else if (job.recipe.method == Method::Threshold) {
    plan_ = threshold_plan(n_layers, o.active);
  } else if (!o.curves.empty()) {
    RoutedPlan measured = read_plan(o.curves, n_layers);
    require<InputError>(!measured.curves.empty(), "{}: holds no measured curves",
                        o.curves.string());
    plan_ = make_plan(std::move(measured.curves), o.active, o.budget);
  }
}

double SelfRoutedConversion::curves_cost() const {
  if (!plan_.layers.empty()) return 0;
  const double n_layers = model_.config().n_layers;
  const auto judged = static_cast<double>(job_.n_tokens) / 3;
  return n_layers * (kPathCost + kMeasureCost * judged * n_layers);
}

double SelfRoutedConversion::thresholds_cost() const {
  return kThresholdsCost * static_cast<double>(job_.n_tokens) * model_.config().n_layers;
}

double SelfRoutedConversion::cost() const { return curves_cost() + thresholds_cost(); }

void SelfRoutedConversion::run(Passes& passes, const Calibration& calibration, Schedule& schedule,
                               ConvertReport& report, const std::filesystem::path& output,
                               engine::Monitor& monitor) {
  const int n_layers = model_.config().n_layers;
  if (plan_.layers.empty()) {
    schedule.next(curves_cost());
    monitor.stage("measure what each layer costs", n_layers);
    plan_ = make_plan(measure_curves(passes, calibration.tokens, calibration.n_ctx, monitor),
                      job_.options.active, job_.options.budget);
  }
  state_.save_plan(plan_json(plan_));
  std::istringstream lines(plan_table(plan_));
  for (std::string line; std::getline(lines, line);) monitor.line(line);

  schedule.next(thresholds_cost());
  monitor.stage("set thresholds", n_layers);
  const std::vector<Thresholds> thresholds =
      apply_plan(passes, plan_, calibration.tokens, calibration.n_ctx, report.layers, monitor);
  for (const LayerReport& layer : report.layers) {
    report.active_fraction += layer.active_fraction / n_layers;
  }
  write_self_routed(*model_.checkpoint().file, thresholds, job_.options, report, output);
}

}  // namespace moesaic::converter
