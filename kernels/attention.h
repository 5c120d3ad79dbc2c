#pragma once

#include <cstdint>
#include <span>

#include "kernels/base/context.h"
#include "kernels/base/view.h"

namespace moesaic::kernels {

/// One layer's keys and values of all sequences: element (slot, position, kv_head, i) at
/// ((slot · capacity + position) · n_kv_heads + kv_head) · head_dim + i.
struct KvLayerView {
  float* keys = nullptr;
  float* values = nullptr;
  std::int64_t n_slots = 0;
  std::int64_t capacity = 0;  // positions per slot
  int n_kv_heads = 0;
  int head_dim = 0;

  std::int64_t row() const { return std::int64_t{n_kv_heads} * head_dim; }  // elements per position
};

/// Where each row of a batch stands: slots[t] its sequence, positions[t] its place in it.
struct TokenPlaces {
  std::span<const std::int32_t> slots;
  std::span<const std::int32_t> positions;
};

/// Writes k and v [n_tokens, n_kv_heads · head_dim] to their places in the cache.
/// Throws ShapeError if a slot or position lies outside.
void store_kv(Context& ctx, ConstMatrix k, ConstMatrix v, const TokenPlaces& places,
              const KvLayerView& cache);

/// Grouped-query causal attention over the cache, in which the batch's own keys already stand:
///   out_{t,h} = Σ_p softmax_p(scale · q_{t,h}·k_{p,g}) v_{p,g},   g = h / (n_heads / n_kv_heads),
///   p from max(0, pos_t − window + 1) (0 if window is 0) to pos_t.
/// q, out [n_tokens, n_heads · head_dim]. float32 throughout, softmax with the maximum subtracted.
/// Rows may belong to different sequences. Throws ShapeError. Source: Ainslie et al. 2023; window
/// as in Gemma 2/3.
void attention(Context& ctx, ConstMatrix q, const TokenPlaces& places, const KvLayerView& cache,
               int n_heads, float scale, std::int64_t window, Matrix out);

}  // namespace moesaic::kernels
