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

  std::int64_t id(std::int64_t j) const { return ids != nullptr ? ids[j] : first + j; }
};

/// Most neurons whose activations are held at once.
inline constexpr std::int64_t kNeuronBatch = 16;

/// How far ahead of its use a neuron is fetched, into the second-level cache: scattered rows defeat
/// the hardware's prefetcher. Q4_1, d_model 576, experts from memory, one thread of Zen 4: 390 ns
/// per neuron without, 225 fetching into the first level, 133 like this; 120 with everything in
/// cache.
inline constexpr std::int64_t kPrefetchNeurons = 8;

/// Fetches neuron j of the list if there is one. always_inline, because GCC takes a call that only
/// prefetches for one without effect and drops it.
[[gnu::always_inline]] inline void prefetch_neuron(const Neurons& list, std::int64_t j) {
  if (j >= list.count) return;
  const std::int64_t bytes = 3 * list.rows.row_bytes();
  const std::byte* p = list.rows.data + list.id(j) * bytes;
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
  __builtin_prefetch(p + bytes - 1, 0, 2);
}

/// Fetches the neurons that add_neurons(list) will begin with.
void add_neurons_soon(const Neurons& list);

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

/// The paths with packed weights (SecretMoeView), for Activations::Q16.
void secret_moe_packed_gather(Context& ctx, const SecretMoeView& layer, ConstMatrix x, Matrix y,
                              std::span<std::int32_t> selected);
void secret_moe_packed_grouped(Context& ctx, const SecretMoeView& layer, ConstMatrix x, Matrix y,
                               std::span<std::int32_t> ids);
void secret_moe_packed_masked(Context& ctx, const SecretMoeView& layer, ConstMatrix x, Matrix y,
                              std::span<std::int32_t> ids);

void secret_moe_gather(Context& ctx, const SecretMoeView& layer, ConstMatrix x, Matrix y,
                       std::span<std::int32_t> selected);

/// y += shared and selected neurons, ids [n_tokens, n_active] as from route().
void secret_moe_grouped(Context& ctx, const SecretMoeView& layer, ConstMatrix x,
                        std::span<const std::int32_t> ids, Matrix y);
void secret_moe_masked(Context& ctx, const SecretMoeView& layer, ConstMatrix x,
                       std::span<const std::int32_t> ids, Matrix y);

}  // namespace moesaic::kernels
