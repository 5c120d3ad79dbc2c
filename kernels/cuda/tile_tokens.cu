#include <algorithm>

#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/base/warp.cuh"
#include "kernels/cuda/tile_tokens.h"

namespace moesaic::cuda {
namespace {

constexpr int kTile = kTileExperts;
constexpr int kMarkThreads = 256;
constexpr int kMarkTokens = 32;
constexpr int kMarkTiles = 256;
constexpr int kWarps = 4;

// A block has 32 tokens and up to kMarkTiles tiles; masks of two tokens share a word.
__global__ void __launch_bounds__(kMarkThreads)
    mark_kernel(const std::int32_t* ids, std::int64_t n_tokens, std::int64_t k,
                std::int64_t n_tiles, std::int64_t stride, std::uint32_t* masks) {
  constexpr int kWords = kMarkTokens / 2;
  __shared__ std::uint32_t words[kMarkTiles * kWords];
  const std::int64_t first_tile = std::int64_t{blockIdx.y} * kMarkTiles;
  const int tiles =
      static_cast<int>(min(n_tiles - first_tile, static_cast<std::int64_t>(kMarkTiles)));
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x; i < tiles * kWords; i += kMarkThreads) words[i] = 0;
  __syncthreads();
  for (int t = warp; t < kMarkTokens; t += kMarkThreads / kWarp) {
    const std::int64_t token = std::int64_t{blockIdx.x} * kMarkTokens + t;
    if (token >= n_tokens) break;
    for (std::int64_t j = lane; j < k; j += kWarp) {
      const std::int32_t id = ids[token * k + j];
      const std::int64_t tile = id / kTile - first_tile;
      if (tile < 0 || tile >= tiles) continue;
      atomicOr(&words[tile * kWords + t / 2], 1u << (16 * (t % 2) + id % kTile));
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tiles * kWords; i += kMarkThreads) {
    masks[(first_tile + i / kWords) * (stride / 2) + blockIdx.x * kWords + i % kWords] = words[i];
  }
}

// A warp per tile.
__global__ void __launch_bounds__(kWarps* kWarp)
    list_kernel(const std::uint16_t* masks, std::int64_t n_tiles, std::int64_t stride,
                std::uint32_t* entries, std::int32_t* counts) {
  const std::int64_t tile = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  const unsigned lane = threadIdx.x % kWarp;
  if (tile >= n_tiles) return;
  int count = 0;
  for (std::int64_t first = 0; first < stride; first += kWarp) {
    const std::uint32_t mask = masks[tile * stride + first + lane];
    const unsigned lanes = __ballot_sync(kAllLanes, mask != 0);
    if (mask != 0) {
      entries[tile * stride + count + __popc(lanes & ((1u << lane) - 1))] =
          static_cast<std::uint32_t>(first + lane) | mask << 16;
    }
    count += __popc(lanes);
  }
  if (lane == 0) counts[tile] = count;
}

}  // namespace

void tile_tokens(const std::int32_t* ids, std::int64_t n_tokens, std::int64_t k,
                 const TileTokens& to, StreamHandle stream) {
  require<ShapeError>(n_tokens <= to.stride && to.stride % kMarkTokens == 0 && n_tokens <= 65536,
                      "tiles of experts: {} tokens in rows of {}, expected a multiple of 32",
                      n_tokens, to.stride);
  if (to.n_tiles == 0 || to.stride == 0) return;
  const dim3 blocks(static_cast<unsigned>(to.stride / kMarkTokens),
                    static_cast<unsigned>(ceil_div(to.n_tiles, kMarkTiles)));
  mark_kernel<<<blocks, kMarkThreads, 0, stream>>>(ids, n_tokens, k, to.n_tiles, to.stride,
                                                   reinterpret_cast<std::uint32_t*>(to.masks));
  check_launch("tiles of experts");
  if (to.entries == nullptr) return;
  list_kernel<<<static_cast<unsigned>(ceil_div(to.n_tiles, kWarps)), kWarps * kWarp, 0, stream>>>(
      to.masks, to.n_tiles, to.stride, to.entries, to.counts);
  check_launch("lists of tokens");
}

}  // namespace moesaic::cuda
