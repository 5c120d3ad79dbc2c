#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "converter/data.h"
#include "converter/job.h"
#include "converter/self_routed/plan.h"
#include "converter/state.h"
#include "converter/stream.h"
#include "models/transformer.h"

namespace moesaic::converter {

/// Conversion to self-routed layers (kernels/self_routed.h), no training: the budget from measured
/// curves, then thresholds layer by layer. The plan is kept in the state folder.
class SelfRoutedConversion {
 public:
  /// Takes over the plan of the folder, or reads the one that was asked for.
  SelfRoutedConversion(const Job& job, models::Transformer& model, StateFolder& state);

  /// Of what is still to be done (Schedule).
  double cost() const;

  /// Writes the hybrid to `output`; fills report.layers and report.active_fraction. Throws as
  /// convert().
  void run(Passes& passes, const Calibration& calibration, Schedule& schedule,
           ConvertReport& report, const std::filesystem::path& output, engine::Monitor& monitor);

  /// After run().
  const RoutedPlan& plan() const { return plan_; }

 private:
  double curves_cost() const;
  double thresholds_cost() const;

  const Job& job_;
  models::Transformer& model_;
  StateFolder& state_;
  RoutedPlan plan_;  // no layers: still to be made
};

/// Throws InputError where options do not fit the recipe: asked before the work, not after it.
void check_self_routed(const Job& job);

/// Bytes at the peak while converting.
std::int64_t self_routed_memory(const Job& job, const models::ModelConfig& config);

}  // namespace moesaic::converter
