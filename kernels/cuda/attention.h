#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/base/view.h"
#include "kernels/cuda/base/stream.h"

namespace moesaic::cuda {

/// Where each row of a batch stands, in device memory: slots[t] its sequence, positions[t] its
/// place in it, each [n_tokens] and inside the cache.
struct TokenPlaces {
  const std::int32_t* slots = nullptr;
  const std::int32_t* positions = nullptr;
};

constexpr int kKvPage = 64;  // positions of a page: a tile of keys never crosses two

/// One layer's keys and values of all sequences, in pages that stand anywhere in device memory.
/// Position p of slot s is in page P = pages[s · pages_per_slot + p / kKvPage]; element (kv_head,
/// i) of its key stands at P[keys + ((p mod kKvPage) · n_kv_heads + kv_head) · head_dim + i], of
/// its value likewise from P[values] on.
struct PagedKv {
  float* const* pages =
      nullptr;  // [n_slots, pages_per_slot]; what no batch has reached is not read
  std::int64_t pages_per_slot = 0;
  std::int64_t keys = 0, values = 0;  // where the layer's begin in a page; multiples of 4
  int n_kv_heads = 0;
  int head_dim = 0;

  std::int64_t row() const { return std::int64_t{n_kv_heads} * head_dim; }  // elements per position
  std::int64_t capacity() const { return pages_per_slot * kKvPage; }        // positions per slot
};

/// Writes k and v [n_tokens, n_kv_heads · head_dim] to their places in the cache. Throws
/// ShapeError.
void store_kv(ConstMatrix k, ConstMatrix v, const TokenPlaces& places, const PagedKv& cache,
              StreamHandle stream);

/// Shape of an attention call, the same for all tokens.
struct AttentionShape {
  int n_heads = 0;
  float scale = 0;
  std::int64_t window = 0;         // 0: all keys
  std::int64_t max_positions = 0;  // every position of the batch is less; what a captured launch
                                   // must serve
};

/// Bytes that attention() needs as workspace.
std::size_t attention_workspace(const AttentionShape& shape, std::int64_t n_tokens, int head_dim);

/// kernels::attention in two launches: blocks of a sequence's keys apart (split KV: few tokens fill
/// the device), each read once for up to 4 heads that share it, then their softmax sums put
/// together. q, out [n_tokens, n_heads · head_dim], head_dim at most 256. float32 throughout. A
/// row's result depends on its own keys alone. Throws ShapeError. Source: Dao et al. 2023,
/// "Flash-Decoding"; pages as in Kwon et al. 2023, "PagedAttention".
void attention(ConstMatrix q, const TokenPlaces& places, const PagedKv& cache,
               const AttentionShape& shape, Matrix out, std::byte* workspace, StreamHandle stream);

}  // namespace moesaic::cuda
