#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>

#include "kernels/base/dtype.h"

namespace moesaic::converter {

/// Tokens that `--recipe best` and `recover` train on unless told otherwise: about an hour of two
/// Zen 4 cores for SmolLM2-135M.
inline constexpr std::int64_t kBestRecoveryTokens = 614'400;

/// What a training changes.
enum class Learns {
  Weights,  // all parameters of the converted layers
  Scales,   // self-routed layers: the block scales of the formats that they stand in
};

class DeviceTraining;
struct TrainingParts;
/// Makes the training on another device (device_training.h).
using MakeDeviceTraining = std::function<std::unique_ptr<DeviceTraining>(const TrainingParts&)>;

/// End-to-end recovery (DESIGN.md section 2, step 7): how long, how fast, and how the routers keep
/// up with the neurons that they rank.
struct RecoverOptions {
  std::int64_t tokens = 0;             // trained; 0: no recovery
  std::int64_t scale_tokens = 65'536;  // after rounding, on scales of self-routed layers' blocks
  double scale_rate = 1e-3;            // Adam, of these
  std::int64_t attention_rank = 0;  // of updates that the attention's matrices learn; 0: they stay
  std::int64_t text = 1 << 20;   // tokens of text that there are at most, passes over them repeat
  std::int64_t self_tokens = 0;  // tokens of the dense model's own text beside a file's
  std::int64_t batch = 1024;     // tokens a step, a multiple of n_ctx
  std::int64_t part = 2048;      // of them at a time, gradients accumulated
  std::int64_t n_ctx = 512;      // window length
  double rate = 2e-3;            // Adam, experts, shared neurons, bypass and bias
  double router_rate = 3e-3;     // the same for the router
  bool scaled_steps = true;      // rates in units of each tensor's root mean square
  double warm_up = 0.03;         // share of the steps with a rising rate, then a cosine to zero
  double clip = 1;               // largest norm of the gradient of all but the routers; 0: none
  double auxiliary = 1;          // weight of the routers' regression loss
  double straight_through = 0;   // weight of the straight-through gate (moe.h); 0: off
  double gate_width = 0.1;       // of that gate, in standard deviations of a token's scores
  std::int64_t refit_every = 0;  // steps between closed-form refits of the routers; 0: never
  double refit_memory = 100;     // steps after which the moments behind a refit fade to 1/e
  double refit_ridge = 1e-3;     // over the mean square of the inputs
  double threshold_gain = 0.5;   // self-routed layers: a threshold vector's factor after a step is
                                // e^(gain · (share that it left − share that it shall leave)) times
                                // that before
  bool straight_through_inputs = false;  // their inputs' gradient passes what was left out
  std::optional<DType> expert_type;      // to write experts in; empty: as the hybrid has them
  std::int64_t held_out = 8192;          // tokens that are never trained on, but judged with
  std::int64_t judge_every = 100;        // steps between two judgements
  double save_seconds = 240;             // between two saved states
  std::uint64_t seed = 0;                // order of the windows
  MakeDeviceTraining device;             // where it trains; empty: on the CPU
};

}  // namespace moesaic::converter
