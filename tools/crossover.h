#pragma once

#include <optional>
#include <string>
#include <vector>

#include "engine/monitor.h"
#include "models/transformer.h"
#include "tools/output.h"

namespace moesaic::tools {

/// Batched decode of a hybrid against the dense model it was made from, over batch sizes and active
/// fractions of the MLPs: where does sparse stop paying?
struct CrossoverSettings {
  std::vector<std::int64_t> batches = {1, 2, 4, 8, 16, 32, 64};  // sequences decoded together
  std::vector<double> fractions;  // wanted; empty: six, from no routed neuron to all
  std::int64_t n_gen = 16;        // passes of one measurement
  std::int64_t depth = 0;         // tokens of each sequence that are in the cache before
  int repetitions = 5;
};

/// One batch size at one active fraction.
struct CrossoverPoint {
  std::vector<double> dense_tps, hybrid_tps;  // one per repetition, measured in turn

  double ratio() const;  // median of hybrid_tps[i] / dense_tps[i]
  double lowest() const;
  double highest() const;
};

struct Crossover {
  CrossoverSettings settings;
  std::vector<double> fractions;                    // as measured, ascending
  std::vector<std::vector<CrossoverPoint>> points;  // [batches, fractions]
  // Filled in by the caller, for what is printed.
  std::string dense, hybrid;  // descriptions
  std::string cpu, activations;
  int threads = 1;

  /// The active fraction from which on dense is faster at this batch: where the ratio, linear
  /// between the points, last falls below 1. Nothing if the hybrid is ahead at the last fraction,
  /// 0 if it is behind at all of them.
  std::optional<double> break_even(std::size_t batch) const;
};

/// The hybrid with other numbers of active neurons, such that Checkpoint::active_fraction() comes
/// as close to `fraction` as whole neurons allow: every layer's own number times one factor, at
/// most all of its experts. Shares the weights.
std::shared_ptr<const models::Checkpoint> with_active_fraction(const models::Checkpoint& hybrid,
                                                               double fraction);

/// Measures dense and hybrid in turn, dense first in one repetition and second in the next, so that
/// what the machine does beside weighs on both alike. Throws InputError for sizes that do not fit
/// the context, or if `hybrid` has no secret-MoE layer or another shape than `dense`; Interrupted.
Crossover measure_crossover(models::Transformer& dense, models::Transformer& hybrid,
                            const CrossoverSettings& settings, engine::Monitor& monitor);

Json crossover_json(const Crossover& result);          // keys: docs/cli.md
std::string crossover_table(const Crossover& result);  // Markdown: rows batch, columns fraction
std::string crossover_svg(const Crossover& result);    // a picture of that table, with the border

}  // namespace moesaic::tools
