#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "converter/adam.h"
#include "converter/recovery/block_scales.h"
#include "converter/recovery/hybrid.h"
#include "models/transformer.h"

namespace moesaic::converter {

/// What a training on another device is made of, borrowed for its life.
struct TrainingParts {
  const models::Checkpoint* dense = nullptr;   // the teacher
  const models::Checkpoint* hybrid = nullptr;  // the student: what stays as it is
  Hybrid<Bfloat16>* model = nullptr;           // and what learns, with its factors and counts
  std::vector<AdamTensor*> tensors;            // in the trainer's order
  std::vector<bool> routers;                   // which of them are routers', not clipped
  struct Scaled {
    std::size_t converted, matrix;  // of the model
    BlockScales* scales;
  };
  bool learns_scales = false;  // the tensors are those of `scaled`; else the converted layers'
  std::vector<Scaled> scaled;
  std::span<const std::int32_t> tokens;  // [n_windows · n_ctx]
  std::int64_t n_ctx = 0;
  std::int64_t batch = 0;  // tokens of a step
  std::int64_t part = 0;   // of them at a time
  bool recompute = false;  // as Hybrid's
  double clip = 0;
};

/// The arithmetic of a training on a device, parameters, gradients and moments in its memory; the
/// host's own stand still meanwhile. A backend makes it from TrainingParts.
class DeviceTraining {
 public:
  virtual ~DeviceTraining() = default;

  /// The host's parameters, thresholds and moments become the device's; and back, without
  /// thresholds, which the host alone changes.
  virtual void put() = 0;
  virtual void fetch() = 0;

  struct Outcome {
    double kl = 0;                // Σ over the step's tokens
    std::vector<double> squares;  // ‖gradient‖² by tensor, before clipping
    // By converted layer: its router's regression loss, 0 where it routes itself.
    std::vector<double> auxiliary;
  };
  /// One step of Adam on these windows, `steps` by tensor; none where a square is NaN or infinite.
  /// What the model's layers saw is added to their counts.
  virtual Outcome step(std::span<const std::int64_t> windows,
                       std::span<const AdamTensor::Step> steps) = 0;

  /// KL divergence of the model from the teacher, Σ over the window's tokens. Counts as step().
  virtual double divergence(std::int64_t window) = 0;

  /// The routers' regression losses on the window, by converted layer; nothing else changes, but
  /// for counts.
  virtual std::vector<double> router_losses(std::int64_t window) = 0;
};

}  // namespace moesaic::converter
