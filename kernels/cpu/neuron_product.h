#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/activation.h"
#include "kernels/base/context.h"
#include "kernels/base/dtype.h"

namespace moesaic::kernels {

/// A vector as it enters products with packed neurons (neurons.h): the numbers of panel_product.h's
/// tiles. Digits stand in the order of the gate and up rows' codes: per 512 columns 8 groups of
/// [16 units][4], what remains in order.
struct NeuronInput {
  std::int8_t* high = nullptr;    // [cols]
  std::int8_t* low = nullptr;     // [cols]
  float* d = nullptr;             // [cols / 32]
  float* d_sum = nullptr;         // [cols / 32]
  std::uint16_t* bf16 = nullptr;  // [cols], only for BF16 neurons
};

/// Scratch bytes of a NeuronInput.
constexpr std::int64_t neuron_input_bytes(std::int64_t cols) {
  return 4 * cols + cols / 32 * 8 + 64;
}

/// Fills an input for neurons of this format, in scratch memory of that size, 64-byte aligned.
NeuronInput make_neuron_input(DType dtype, const float* x, std::int64_t cols, std::byte* scratch);

/// Consecutive or listed neurons in the order of neurons.h.
struct PackedNeurons {
  const std::byte* data = nullptr;
  DType dtype = DType::Q8_0;
  std::int64_t cols = 0;              // d_model
  const std::int32_t* ids = nullptr;  // neuron j is ids[j], or first + j if null
  std::int64_t first = 0;
  std::int64_t count = 0;
  const float* mean = nullptr;  // μ by neuron id, or null for 0

  std::int64_t id(std::int64_t j) const { return ids != nullptr ? ids[j] : first + j; }
};

/// y += Σ_j (φ(w_gate,j · x)(w_up,j · x) − μ_j) w_down,j on the calling thread; y [cols] float32.
/// The next neurons are fetched while one runs. `scratch` holds cols floats. has_neurons(dtype,
/// cols).
void add_packed_neurons(Context& ctx, const PackedNeurons& neurons, Activation phi,
                        const NeuronInput& x, float* y, float* scratch);

/// Fetches those that add_packed_neurons will begin with.
void packed_neurons_soon(const PackedNeurons& neurons);

/// Listed rows of a matrix in the order of pack_in_rows() (neurons.h).
struct ListedRows {
  const std::byte* data = nullptr;
  DType dtype = DType::Q8_0;
  std::int64_t cols = 0;
  const std::int32_t* ids = nullptr;
  std::int64_t count = 0;
};

/// y[i] = row i · x for the listed i, on the calling thread; other elements of y are left alone.
/// has_neurons(dtype, cols).
void multiply_rows(const ListedRows& rows, const NeuronInput& x, float* y);

}  // namespace moesaic::kernels
