#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "converter/data.h"
#include "converter/job.h"
#include "converter/state.h"
#include "converter/stream.h"
#include "models/transformer.h"

namespace moesaic::converter {

/// Steps 1 to 6 of DESIGN.md section 2 for layers of kind "glu+low_rank", or "glu+low_rank+none"
/// where experts are blocks of neurons: sensitivity, budget, and layer by layer calibration, closed
/// form and distillation. Finished layers are kept in the state folder.
class LowRankConversion {
 public:
  /// Takes over what the folder holds.
  LowRankConversion(const Job& job, models::Transformer& model, StateFolder& state);

  /// Of what is still to be done (Schedule).
  double cost() const;

  /// All layers in order; report.active_fraction becomes the plan's. Throws as convert().
  std::vector<SavedLayer> run(Passes& passes, const Calibration& calibration, Schedule& schedule,
                              ConvertReport& report, engine::Monitor& monitor);

 private:
  std::int64_t sensitivity_tokens() const;
  double sensitivity_cost() const;
  std::vector<bool> wanted() const;  // by --layers
  /// Measures and allots; both are left as they are kept.
  void make_plan(Passes& passes, const Calibration& calibration, Schedule& schedule,
                 engine::Monitor& monitor, std::vector<LayerPlan>& plans,
                 std::vector<double>& sensitivity);

  const Job& job_;
  models::Transformer& model_;
  StateFolder& state_;
  std::optional<std::string> kept_plan_;
  std::vector<SavedLayer> saved_;
};

/// Sizes that do not depend on the budget. Throws InputError where --block or --experts do not fit
/// the checkpoint's neurons.
PlanShape plan_shape(const models::ModelConfig& config, const Recipe& recipe,
                     const ConvertOptions& options);

/// Throws InputError where --active, --expert-type or --router-type cannot be had for this
/// checkpoint: asked before the work, not after it.
void check_low_rank(const Job& job, const models::Checkpoint& checkpoint);

/// Bytes at the peak while converting.
std::int64_t low_rank_memory(const Job& job);

}  // namespace moesaic::converter
