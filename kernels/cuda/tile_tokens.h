#pragma once

#include <cstdint>

#include "kernels/cuda/base/stream.h"

namespace moesaic::cuda {

inline constexpr int kTileExperts = 16;

/// Which of a few hundred tokens want which tiles of 16 experts, in device memory. `stride`: at
/// least the number of tokens, a multiple of 32.
struct TileTokens {
  std::uint16_t* masks;  // [n_tiles, stride]: a bit for each expert of the tile that token t chose
  std::uint32_t* entries;  // [n_tiles, stride]: of the tokens with such bits, ascending: t + mask
                           // · 2¹⁶; null: not wanted
  std::int32_t* counts;    // [n_tiles]: entries of each tile
  std::int64_t n_tiles;
  std::int64_t stride;
};

/// Groups tokens by the experts that they chose, ids [n_tokens, k], each in [0, 16 n_tiles): marks
/// in shared memory, a histogram whose counters are bits; then places by prefix sums over ballots.
/// The result is the same in whatever order blocks run. masks at a multiple of 4 bytes. Throws
/// ShapeError: n_tokens beyond the stride or 65,536.
void tile_tokens(const std::int32_t* ids, std::int64_t n_tokens, std::int64_t k,
                 const TileTokens& to, StreamHandle stream);

}  // namespace moesaic::cuda
