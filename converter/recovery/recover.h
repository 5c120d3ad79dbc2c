#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "converter/recovery/options.h"
#include "converter/recovery/packed.h"
#include "engine/monitor.h"
#include "models/transformer.h"

namespace moesaic::converter {

/// How a recovery went.
struct RecoveryReport {
  struct Point {
    std::int64_t tokens = 0;  // trained so far
    double kl = 0;            // mean over the steps since the last point, nats a token
    double auxiliary = 0;     // routers' regression loss over what it was at the start, likewise
    double held_out = 0;      // KL on held-out text
    double active = 0;        // multiply-adds of the MLPs over the dense ones' there
  };
  std::int64_t tokens = 0;
  double seconds = 0;  // of all runs
  // Held-out text: before, after in float32, rounded to the formats of the file, and as written,
  // scales tuned. KL divergence in nats a token; multiply-adds of the MLPs over the dense ones',
  // mean over layers.
  double kl_start = 0, kl_trained = 0, kl_rounded = 0, kl_packed = 0;
  double active_start = 0, active_trained = 0, active_packed = 0;
  std::vector<Point> curve;
};

/// Where the trainings of a recovery are saved.
struct RecoveryFiles {
  std::filesystem::path weights, scales;
};

struct Recovered {
  PackedLayers layers;
  std::vector<PackedAttention> attention;  // of layers whose attention learnt
  double active_fraction = 0;              // of the hybrid with them, by its description
  RecoveryReport report;
};

/// Step 7 of DESIGN.md section 2: trains a hybrid's converted layers (experts, shared neurons,
/// bypass, bias and routers; the matrices of self-routed ones, whose thresholds follow so that
/// their shares stay; with options.attention_rank low-rank updates of the attention, which are
/// merged into its matrices) on the KL divergence from the dense model over windows of `tokens`,
/// then rounds what was trained to the file's formats (pack.h), then, codes fixed, trains the
/// scales of self-routed layers' blocks (block_scales.h), so that what rounding lost comes back.
/// Either training may be left out. They are saved in the two files of `state` every few minutes
/// and when the user interrupts; where a file is there already, its training goes on from there,
/// bit for bit. Throws Interrupted (state kept), InputError, Error (NaN), IoError.
Recovered recover(std::shared_ptr<const models::Checkpoint> dense,
                  std::shared_ptr<const models::Checkpoint> hybrid,
                  std::span<const std::int32_t> tokens, const RecoverOptions& options,
                  const RecoveryFiles& state, Context& ctx, engine::Monitor& monitor);

/// Writes the hybrid again with the recovered layers and attention in the places of its own, and
/// moesaic.recovery.{tokens (u64), kl_start, kl_end (f32)}; with self-routed layers their shares
/// and the active fraction, too. The rest as it was. Atomic.
void write_recovered(const models::GgufFile& hybrid, const Recovered& recovered,
                     const std::filesystem::path& output);

/// Bytes that recover() takes beside what is mapped: parameters, gradients and Adam's moments,
/// their operands, one part's tapes, the frozen weights, the teacher's hidden states and what
/// packing a layer takes.
std::int64_t recovery_bytes(const models::Checkpoint& hybrid, const RecoverOptions& options,
                            std::int64_t n_tokens);

}  // namespace moesaic::converter
