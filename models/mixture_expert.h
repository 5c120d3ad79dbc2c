#pragma once

#include <cstdint>
#include <vector>

#include "kernels/mixture.h"

namespace moesaic::models {

/// One expert of a mixture, unpacked, to look at what it adds: Σ_{i∈e} (f_i(x) − μ_i) w_out,i.
class MixtureExpert {
 public:
  /// 0 <= expert < n_experts.
  MixtureExpert(const kernels::MixtureView& layer, std::int64_t expert);

  /// Euclidean length of what it adds, before its gate.   x [d_model]
  double length(const float* x) const;

 private:
  kernels::MixtureKind kind_;
  kernels::Activation phi_;
  std::size_t block_, d_model_;
  std::vector<float> rows_;         // [rows_per_neuron · block, d_model]
  std::vector<float> bias_, mean_;  // [block]
};

}  // namespace moesaic::models
