#pragma once

#include <cstdint>

#include "kernels/base/thread_pool.h"

namespace moesaic::kernels {

// How attention cuts its work. A unit is a block of consecutive tokens of one sequence, and some of
// the query heads of one key/value head; its rows are (token, head) pairs, token-major.

/// Keys that are scored, softened and summed at a time. The scores of a unit (96 × 128 floats) and
/// a packed tile of keys (128 × head_dim) stay in the second-level cache.
inline constexpr std::int64_t kTileKeys = 128;
/// Rows a unit should have: enough to share the packing of the keys, few enough to share a cache.
inline constexpr std::int64_t kUnitRows = 96;
/// Rows of the product's register block.
inline constexpr std::int64_t kRowGroup = 6;
/// Up to this many rows, keys are read where they stand and not packed.
inline constexpr std::int64_t kMaxDotRows = 4;
/// Row widths are padded to a multiple of this, which every vector length divides.
inline constexpr std::int64_t kWidthMultiple = 16;

/// One unit of work.
struct AttentionJob {
  const float* q = nullptr;       // [n_tokens, n_heads · head_dim], rows q_stride apart
  float* out = nullptr;           // as q, rows out_stride apart
  const float* keys = nullptr;    // of this slot and key/value head, position 0; kv_stride apart
  const float* values = nullptr;  // likewise
  std::int64_t q_stride = 0;
  std::int64_t out_stride = 0;
  std::int64_t kv_stride = 0;
  std::int64_t n_tokens = 0;
  std::int64_t n_heads = 0;  // query heads of this unit
  std::int64_t head_dim = 0;
  std::int64_t padded_dim = 0;      // head_dim rounded up to kWidthMultiple
  std::int64_t first_position = 0;  // token t stands at first_position + t
  std::int64_t window = 0;
  float scale = 1;
};

/// One thread's scratch memory, for up to n_rows rows.
struct AttentionScratch {
  float* q = nullptr;        // [n_rows, head_dim], scaled
  float* out = nullptr;      // [n_rows, padded_dim], not yet divided by sum
  float* scores = nullptr;   // [n_rows, kTileKeys]
  float* maximum = nullptr;  // [n_rows] of the scores so far
  float* sum = nullptr;      // [n_rows] of the exponentials so far
  float* shrink = nullptr;   // [n_rows] what a tile's new maximum does to the earlier sums
  float* keys = nullptr;     // [kTileKeys, head_dim] packed; unused up to kMaxDotRows rows
  float* values = nullptr;   // [kTileKeys, padded_dim]; unused if padded_dim == head_dim
};

}  // namespace moesaic::kernels
