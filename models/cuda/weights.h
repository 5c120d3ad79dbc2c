#pragma once

#include <span>
#include <vector>

#include "kernels/cuda/base/arena.h"
#include "kernels/cuda/base/stream.h"
#include "models/transformer.h"

namespace moesaic::models {

/// A checkpoint's weights in device memory, in the file's formats: the same views as Checkpoint
/// has, without panels; what self-routed layers read by columns stands in that order alone. One
/// arena holds them all.
struct CudaWeights {
  /// Copies them to the current device. Throws DeviceError.
  CudaWeights(const Checkpoint& checkpoint, const cuda::Stream& stream);

  WeightView embedding, head;
  std::span<const float> output_norm;
  std::vector<LayerWeights> layers;
  std::vector<std::span<const float>> rope_freq;  // [n_layers][head_dim / 2]

 private:
  cuda::Arena arena_;
};

}  // namespace moesaic::models
