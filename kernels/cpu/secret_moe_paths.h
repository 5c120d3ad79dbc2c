#pragma once

#include <cstdint>
#include <span>

#include "kernels/secret_moe.h"

/// What the paths of secret_moe() share. Shapes are checked before any of this is called.
namespace moesaic::kernels {

/// Consecutive or listed neurons of a matrix whose rows 3i, 3i + 1, 3i + 2 are w_gate,i, w_up,i and
/// w_down,i.
struct Neurons {
  WeightView rows;
  const std::int32_t* ids = nullptr;  // neuron j is ids[j], or first + j if null
  std::int64_t first = 0;
  std::int64_t count = 0;
  const float* mean = nullptr;  // μ by neuron id, or null for 0
};

/// Most neurons whose activations are held at once.
inline constexpr std::int64_t kNeuronBatch = 16;

/// y += Σ_j (φ(w_gate,j · x)(w_up,j · x) − μ_j) w_down,j on the calling thread. x [d_model] already
/// rounded if `ctx` says BF16, y [d_model]. Counts the bytes of the neurons it reads as Experts.
void add_neurons(Context& ctx, const Neurons& neurons, Activation phi, const float* x, float* y);

/// The selection for a batch: ids [n_tokens, n_active], ascending per token. x [n_tokens, d_model]
/// already rounded if `ctx` says BF16. Bit for bit the scores of the gather path.
void route(Context& ctx, const SecretMoeView& layer, ConstMatrix x, std::span<std::int32_t> ids);

/// y = b + P (Q x), the part that takes no selection. x as in route().
void bias_and_bypass(Context& ctx, const SecretMoeView& layer, ConstMatrix x, Matrix y);

/// y += Σ_thread partial[thread], in thread order. partial [n_threads, n_tokens, d_model].
void add_partials(Context& ctx, std::span<const float> partial, Matrix y);

void secret_moe_gather(Context& ctx, const SecretMoeView& layer, ConstMatrix x, Matrix y,
                       std::span<std::int32_t> selected);

/// y += shared and selected neurons, ids [n_tokens, n_active] as from route().
void secret_moe_grouped(Context& ctx, const SecretMoeView& layer, ConstMatrix x,
                        std::span<const std::int32_t> ids, Matrix y);
void secret_moe_masked(Context& ctx, const SecretMoeView& layer, ConstMatrix x,
                       std::span<const std::int32_t> ids, Matrix y);

}  // namespace moesaic::kernels
