#pragma once

#include "kernels/cuda/activate.cuh"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/self_routed.h"

namespace moesaic::cuda {

/// Those of a layer, in device memory.
struct Thresholds {
  const float* input;   // [d_model]
  const float* gate;    // [d_ff]; null: nothing is routed by the gate
  const float* hidden;  // [d_ff]
};

inline Thresholds thresholds_of(const kernels::SelfRoutedView& layer) {
  return {layer.input_threshold.data(), layer.up_by_input ? nullptr : layer.gate_threshold.data(),
          layer.hidden_threshold.data()};
}

/// An entry of x̂. NaN is not large.
__device__ inline float large_or_zero(float x, float threshold) {
  return fabsf(x) >= threshold ? x : 0.0f;
}

__device__ inline bool is_routed(float a, float threshold) { return fabsf(a) >= threshold; }

/// a u of a routed neuron, or 0 where that is below its threshold.
__device__ inline float kept_or_zero(float a, float u, float threshold) {
  const float h = __fmul_rn(a, u);
  return fabsf(h) >= threshold ? h : 0.0f;
}

/// Throws ShapeError unless layer, x and y fit each other and what the kernels read at once.
inline void check_operands(const kernels::SelfRoutedView& layer, ConstMatrix x, ConstMatrix y) {
  kernels::check_shapes(layer);
  const std::int64_t d_model = layer.d_model();
  require<ShapeError>(x.cols == d_model && y.cols == d_model && y.rows == x.rows,
                      "self-routed layer: x [{}, {}] and y [{}, {}], expected [n, {}]", x.rows,
                      x.cols, y.rows, y.cols, d_model);
  for (const std::int64_t n : {d_model, layer.d_ff()}) {
    require<ShapeError>(n % 4 == 0, "self-routed layer: {} entries, expected a multiple of 4", n);
  }
  require_aligned_rows("self-routed layer", x);
}

}  // namespace moesaic::cuda
