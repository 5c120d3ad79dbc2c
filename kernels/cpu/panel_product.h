#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/base/thread_pool.h"
#include "kernels/base/view.h"

namespace moesaic::kernels {

// How activations enter products with panels (panels.h). Tokens come in tiles of up to kTileTokens;
// a tile of T tokens holds, for each unit of 32 columns,
//
//   int16    q as two signed digits, q = 128 high + low: high [T][32] bytes, low [T][32] bytes;
//   then
//            d [T] float32, d·Σq [T] float32, −Σq of columns 0–15 [T] int32 and of columns 16–31
//            [T] int32:   x[c] ≈ d q[c],  d = max|x| / (127 · 128) over the unit
//   bfloat16 x [T][32], nearest even
//
// so that a product reads a tile from its first byte to its last.

inline constexpr std::int64_t kTileTokens = 8;

enum class TileKind { Int16, BFloat16 };

/// Bytes of one token's part of a unit.
inline constexpr std::int64_t kInt16TokenBytes = 80;

/// Bytes of one token's part of a tile.
constexpr std::int64_t tile_token_bytes(TileKind kind, std::int64_t cols) {
  return cols / 32 * (kind == TileKind::Int16 ? kInt16TokenBytes : 64);
}

/// Writes the tokens of x, at most kTileTokens, as one tile; x.cols a multiple of 32. A unit with a
/// NaN or an infinity gets d = NaN, and so does every sum that it enters.
void make_tile(TileKind kind, ConstMatrix x, std::byte* tile);

/// The same numbers for a single vector, each kind in a row of its own: digits [cols], d and d·Σq
/// [cols / 32].
void quantize_vector(const float* x, std::int64_t cols, std::int8_t* high, std::int8_t* low,
                     float* d, float* d_sum);

/// One product: Y[:, rows of the panels] (+)= X W[rows, :]ᵀ, on the calling thread.
struct PanelProduct {
  const std::byte* panels = nullptr;  // of the whole matrix
  DType dtype = DType::Q8_0;
  std::int64_t rows = 0;  // of the whole matrix
  std::int64_t cols = 0;
  Range range;                       // of panels
  const std::byte* tiles = nullptr;  // full ones, then the rest
  std::int64_t n_tokens = 0;
  Matrix y;  // [n_tokens, rows]
  bool accumulate = false;
};

/// What activations a product with this format takes.
constexpr TileKind tile_kind(DType dtype) {
  return dtype == DType::BF16 ? TileKind::BFloat16 : TileKind::Int16;
}

/// Sums of integer products are exact within a unit; units are added in float32, in order. What one
/// (row, token) pair gets depends on neither the range nor the other tokens.
void multiply_panels(const PanelProduct& product);

}  // namespace moesaic::kernels
