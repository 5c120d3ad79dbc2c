#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/base/view.h"
#include "kernels/rope.h"

/// The obvious loops, in double: what the kernels are tested against. Matrices come back row-major.
namespace moesaic::reference {

std::vector<double> rms_norm(ConstMatrix x, std::span<const float> weight, double eps);

std::vector<double> rope(ConstMatrix x, int head_dim, std::span<const std::int32_t> positions,
                         std::span<const float> freq, kernels::RopeStyle style);

double activate(kernels::Activation phi, double x);

/// One pass over the keys of each (token, head) for the scores, one for the sum.
std::vector<double> attention(ConstMatrix q, const kernels::TokenPlaces& places,
                              const kernels::KvLayerView& cache, int n_heads, double scale,
                              std::int64_t window);

/// By a stable sort.
std::vector<std::int32_t> top_k(std::span<const float> scores, std::size_t k);

}  // namespace moesaic::reference
