#pragma once

#include <cstddef>
#include <cstdint>

namespace moesaic::kernels {

// The element-wise passes of self_routed() and of its training, on the calling thread. Marks are
// words of 32 bits, bit i % 32 of marks[i / 32] for element i. NaN is below every threshold.

/// Marks |x_i| >= threshold_i and, unless kept is null, kept_i = x_i there and 0 elsewhere; kept
/// may be x. Returns how many. marks [⌈n / 32⌉].
std::int64_t keep_large(const float* x, const float* threshold, std::size_t n, float* kept,
                        std::uint32_t* marks);

struct NeuronCounts {
  std::int64_t routed = 0, kept = 0;
};

/// h_i = a_i u_i where |a_i| >= gate_i and |a_i u_i| >= hidden_i, marked as kept, else 0; without
/// gate thresholds (null) the second alone. h may be a; u need only hold numbers where a neuron is
/// routed.
NeuronCounts keep_neurons(const float* a, const float* u, const float* gate, const float* hidden,
                          std::size_t n, float* h, std::uint32_t* marks);

/// For a backward pass, in place: where keep_neurons() keeps neuron i, h_i = a_i u_i takes the
/// place of u_i, ∂h_i/∂g_i = φ'_i u_i that of slope_i = φ'_i, and ∂h_i/∂u_i = a_i stays; elsewhere
/// all three become 0.
NeuronCounts keep_slopes(const float* gate, const float* hidden, std::size_t n, float* a, float* u,
                         float* slope);

}  // namespace moesaic::kernels
