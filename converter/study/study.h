#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "converter/study/own_start.h"
#include "converter/study/train.h"
#include "engine/monitor.h"
#include "kernels/base/context.h"

namespace moesaic::converter::study {

/// What `moesaic study` was asked for.
struct StudyOptions {
  std::filesystem::path model;
  int layer = 0;
  std::filesystem::path data;
  std::int64_t tokens = 0;  // of the text; 0: all
  std::vector<Inputs> inputs = {Inputs::Real, Inputs::Gaussian};
  std::vector<Family> families = {kFamilies.begin(), kFamilies.end()};
  std::vector<std::int64_t> active_neurons = {16, 32, 64, 128, 256, 512};
  std::int64_t n_experts = 10000;
  std::int64_t router_rank = 128;
  TrainOptions train;
  double own_passes = 3;  // of our own start's distillation, at most 3; negative: no own start
  // Finished cells are kept here, and taken over where they are there already; empty: nowhere.
  std::filesystem::path resume;
};

/// One place of the table.
struct Cell {
  Inputs inputs = Inputs::Real;
  std::int64_t n_neurons = 0;  // active ones
  StudentShape shape;
  bool operator==(const Cell&) const = default;
};

/// All cells that the options ask for: inputs, within them families, each in the order given
/// without repeats, within them active neurons ascending. Throws InputError (nothing to do, a
/// student that has no room).
std::vector<Cell> study_cells(const StudyOptions& options, std::int64_t d_model);

/// A trained cell.
struct CellResult {
  Cell cell;
  double active_fraction = 0;  // multiply-adds over the dense MLP's, router counted; may exceed 1
  Unexplained held_out;        // NaN where all rates diverged
  double rate = 0;             // the best; NaN where all rates diverged
  std::vector<RateResult> by_rate;
  double seconds = 0;
  std::optional<OwnStart> own;  // at the same multiply-adds or fewer
  std::optional<double> published;
};

/// Everything that the table, the JSON and the figure are made of.
struct StudyReport {
  std::string model, data, name;  // paths; general.name
  std::string source_digest, data_digest;
  int layer = 0;
  std::int64_t d_model = 0, d_ff = 0;
  std::int64_t n_tokens = 0, n_fit = 0, n_choose = 0, n_held_out = 0;
  std::int64_t n_sinks = 0;           // of all tokens
  std::int64_t n_held_out_sinks = 0;  // of the held-out ones
  // Share of the real outputs' squared distance from their mean, held-out rows, that sinks make up.
  double sink_share = 0;
  std::string activations;  // "f32" or "bf16"
  int n_threads = 0;
  StudyOptions options;
  std::vector<CellResult> cells;
  double seconds = 0;  // of this run
};

/// Collects the layer's activations and trains every cell. Products in the precision of
/// ctx.activations. Says through monitor.line() what it found and each cell's result. Throws
/// InputError, FormatError (NaN in the activations: names the layer; a kept cell that is damaged:
/// names the file), IoError, Interrupted (finished cells are kept).
StudyReport run_study(const StudyOptions& options, Context& ctx, engine::Monitor& monitor);

}  // namespace moesaic::converter::study
