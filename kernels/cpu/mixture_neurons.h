#pragma once

#include <cstdint>

#include "kernels/base/thread_pool.h"
#include "kernels/mixture.h"

namespace moesaic::kernels {

/// Shared neurons of a mixture, or those of the experts selected for one token.
struct MixtureNeurons {
  ExpertKind kind = ExpertKind::Glu;
  Activation phi = Activation::GeluTanh;
  std::int64_t block = 1;
  WeightView rows;
  const float* bias = nullptr;        // b by neuron, or null for 0
  const float* mean = nullptr;        // μ by neuron, or null for 0
  const std::int32_t* ids = nullptr;  // expert at each place, or null: expert i at place i
  const float* gate = nullptr;        // of the expert at each place, or null for 1
};

/// y += Σ_{p ∈ neurons} g (f_p(x) − μ_p) w_out,p on the calling thread; neuron p is number p %
/// block of the expert at place p / block.   x [d_model] already rounded if `ctx` says BF16, y
/// [d_model].
void add_mixture_neurons(const Context& ctx, const MixtureNeurons& list, Range neurons,
                         const float* x, float* y);

}  // namespace moesaic::kernels
