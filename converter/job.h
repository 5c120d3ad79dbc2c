#pragma once

#include <cstdint>
#include <filesystem>

#include "converter/allot.h"
#include "converter/convert.h"
#include "converter/recipe.h"
#include "engine/monitor.h"

namespace moesaic::converter {

/// The options as given, completed by what the checkpoint implies.
struct Job {
  const ConvertOptions& options;
  const Recipe& recipe;
  std::int64_t n_tokens;
  PlanShape shape;         // of low-rank recipes
  RecoverOptions recover;  // tokens 0: none
};

/// Tells the monitor which share of the whole conversion each stage is, for its ETA. Costs are in a
/// unit of about 34 µs on two Zen 4 cores: what calibration takes per token and layer of
/// SmolLM2-135M.
class Schedule {
 public:
  Schedule(engine::Monitor& monitor, double total) : monitor_(monitor), total_(total) {}

  /// Work that turned out not to be needed.
  void drop(double cost) { total_ -= cost; }

  /// The stage that begins next costs this much.
  void next(double cost) {
    monitor_.job(done_ / total_, (done_ + cost) / total_);
    done_ += cost;
  }

  /// Of the whole job, once the stages begun so far are over.
  double share() const { return done_ / total_; }

 private:
  engine::Monitor& monitor_;
  double total_;
  double done_ = 0;
};

}  // namespace moesaic::converter
