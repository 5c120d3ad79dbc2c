#include <algorithm>
#include <cmath>

#include "kernels/cuda/activate.cuh"
#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/last_block.cuh"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/base/row_slice.cuh"
#include "kernels/cuda/base/row_stream.cuh"
#include "kernels/cuda/base/tensor_core.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/secret_moe.h"
#include "kernels/cuda/tile_tokens.h"
#include "kernels/cuda/top_k.h"

// Neurons are taken 16 at a time, as tensor cores want them: a tile (tile_tokens.h). Its tokens are
// multiplied with all of its neurons; what was not chosen becomes zero.
namespace moesaic::cuda {
namespace {

using kernels::Activation;
using kernels::MoePath;
using kernels::SecretMoeView;

constexpr std::int64_t kChunk = 512;  // tokens kept together: bounds the workspace
constexpr int kTile = kTileExperts;   // neurons
constexpr int kTokens = 64;           // of a block
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = 2 * kTile;  // of weights that a block unpacks at once
constexpr int kSliceLanes = 16;
constexpr int kSlice = 8 * kSliceLanes;  // their columns
// Rows in shared memory are an odd number of 16-byte pieces apart: eight of them are in all banks.
constexpr int kStride = kSlice + 8;
constexpr int kHiddenStride = kRows + 8;
constexpr int kRoundThreads = 128;
constexpr std::int64_t kMaxGroups = 8;
constexpr std::int64_t kWantedBlocks = 128;  // about as many as a device has processors

// to [n, padded] = x rounded, zero beyond its columns; four columns a thread.
__global__ void __launch_bounds__(kRoundThreads)
    round_kernel(ConstMatrix x, std::int64_t padded, __nv_bfloat16* to) {
  const std::int64_t c = 4 * (std::int64_t{blockIdx.x} * kRoundThreads + threadIdx.x);
  if (c >= padded) return;
  float v[4];
  load_floats<4>(x.data + blockIdx.y * x.stride + c, x.cols - c, v);
  *reinterpret_cast<std::uint64_t*>(to + blockIdx.y * padded + c) =
      bf16_four(v[0], v[1], v[2], v[3]);
}

// Tiles of one launch: those of shared neurons, which every token wants, then those of experts.
struct Tiles {
  WeightBytes shared, experts;
  std::int64_t n_shared, n_experts, shared_tiles, n;
  std::int64_t cols;  // d_model

  __device__ bool is_shared(std::int64_t tile) const { return tile < shared_tiles; }
  __device__ const WeightBytes& weights(std::int64_t tile) const {
    return is_shared(tile) ? shared : experts;
  }
  __device__ std::int64_t first_neuron(std::int64_t tile) const {
    return kTile * (is_shared(tile) ? tile : tile - shared_tiles);
  }
  // How many of its 16 there are.
  __device__ int count(std::int64_t tile) const {
    const std::int64_t left = (is_shared(tile) ? n_shared : n_experts) - first_neuron(tile);
    return static_cast<int>(min(left, static_cast<std::int64_t>(kTile)));
  }
};

// Slices of 32 rows of weights on their way to a block: a warp has 8 rows, two at a time.
template <class Format>
struct WeightRows {
  using Slice = RowSlice<Format, kSliceLanes>;
  static constexpr int kBuffer = staged_bytes(Slice::kMaxBytes);
  static constexpr int kBytes = kRows * kBuffer;
  static constexpr int kSteps = kRows / kWarps / 2;

  const std::uint8_t* at[kSteps];  // null: a row of zeros

  __device__ static int row(int i) {
    return threadIdx.x / kWarp * (kRows / kWarps) + 2 * i + threadIdx.x % kWarp / kSliceLanes;
  }
  // row_of(r) is r's row in its matrix, or −1; bytes_of(r) the matrix.
  template <class RowOf, class BytesOf>
  __device__ void fetch(std::int64_t c, std::int64_t cols, RowOf row_of, BytesOf bytes_of,
                        std::uint8_t* raw) {
    const std::int64_t row_bytes = cols / Format::kElems * Format::kBytes;
    const int count = static_cast<int>(min(cols - c, static_cast<std::int64_t>(kSlice)));
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const std::int64_t from = row_of(row(i));
      at[i] = nullptr;
      if (from < 0) continue;
      at[i] = stage<kSliceLanes>(bytes_of(row(i)), from * row_bytes + Slice::first_byte(c),
                                 from * row_bytes + Slice::end_byte(c, count),
                                 raw + row(i) * kBuffer, threadIdx.x % kSliceLanes);
    }
  }
  // After the copies have arrived: w [kRows, kStride], columns beyond the row's are zero.
  __device__ void unpack(std::int64_t c, std::int64_t cols, __nv_bfloat16* w) const {
    const int l = threadIdx.x % kSliceLanes;
    const int count = static_cast<int>(min(cols - c, static_cast<std::int64_t>(kSlice)));
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      float values[8] = {};
      if (at[i] != nullptr) Slice::unpack(at[i], c, l, count, values);
      // In pieces as wide as the format's vectors: 8 bytes are a pass over the banks less than two
      // of 4.
      for (int v = 0; v < Format::kVectors; ++v) {
        __nv_bfloat16* to = w + row(i) * kStride + Slice::column(l, v);
        const float* of = values + Format::kWidth * v;
        if constexpr (Format::kWidth == 4) {
          *reinterpret_cast<std::uint64_t*>(to) = bf16_four(of[0], of[1], of[2], of[3]);
        } else {
          *reinterpret_cast<std::uint32_t*>(to) = bf16_pair(of[0], of[1]);
        }
      }
    }
  }
};

struct Hidden {
  Activation phi;
  const __nv_bfloat16* x;  // [n_tokens, padded]
  std::int64_t padded;
  const float* mean;
  const std::uint16_t* masks;    // TileTokens of the experts
  const std::uint32_t* entries;  // null: every token wants every tile
  const std::int32_t* counts;
  std::int64_t stride, n_tokens;
  __nv_bfloat16* h;  // [n_tokens, h_cols], this launch's tiles from column h_first on
  std::int64_t h_cols, h_first;
};

template <class Format>
constexpr int kHiddenBytes = 2 * (2 * kTokens + kRows) * kStride
                             + WeightRows<Format>::kBytes;  // shared memory

// h = φ(x · w_gate)(x · w_up) − μ of a tile for 64 of the tokens that want it: a warp has 16
// tokens.
template <class Format>
__global__ void __launch_bounds__(kThreads, 3)
    hidden_kernel(const __grid_constant__ Tiles tiles, const __grid_constant__ Hidden to) {
  extern __shared__ __align__(16) std::uint8_t memory[];
  auto* const xs = reinterpret_cast<__nv_bfloat16*>(memory);  // [2, kTokens, kStride]
  __nv_bfloat16* const ws = xs + 2 * kTokens * kStride;       // [gate and up of a tile, kStride]
  std::uint8_t* const raw = memory + 2 * (2 * kTokens + kRows) * kStride;
  __shared__ std::uint32_t entry[kTokens];
  __shared__ float mean[kTile];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::int64_t tile = blockIdx.x, expert_tile = tile - tiles.shared_tiles;
  const bool is_shared = tiles.is_shared(tile), listed = !is_shared && to.entries != nullptr;
  const std::int64_t n = listed ? to.counts[expert_tile] : to.n_tokens;
  const std::int64_t first = std::int64_t{blockIdx.y} * kTokens;
  if (first >= n) return;
  const int n_here = static_cast<int>(min(n - first, static_cast<std::int64_t>(kTokens)));
  const std::int64_t neuron = tiles.first_neuron(tile);
  const int n_neurons = tiles.count(tile);
  if (threadIdx.x < kTokens) {
    // Beyond the last token its first is multiplied once more, and not kept.
    const std::int64_t t = first + (static_cast<int>(threadIdx.x) < n_here ? threadIdx.x : 0);
    std::uint32_t e = static_cast<std::uint32_t>(t);
    if (listed) {
      e = to.entries[expert_tile * to.stride + t];
    } else if (is_shared) {
      e |= 0xffff0000u;
    } else {
      e |= static_cast<std::uint32_t>(to.masks[expert_tile * to.stride + t]) << 16;
    }
    entry[threadIdx.x] = e;
  } else if (threadIdx.x < kTokens + kTile) {
    const int i = threadIdx.x - kTokens;
    mean[i] = is_shared || i >= n_neurons ? 0.0f : to.mean[neuron + i];
  }
  __syncthreads();

  WeightRows<Format> rows;
  const auto fetch = [&](std::int64_t c, int buffer) {
    rows.fetch(
        c, tiles.cols,
        [&](int r) {
          return r % kTile < n_neurons ? 3 * (neuron + r % kTile) + r / kTile : std::int64_t{-1};
        },
        [&](int) -> const WeightBytes& { return tiles.weights(tile); }, raw);
    for (int i = threadIdx.x; i < kTokens * (kSlice / 8); i += kThreads) {
      const int t = i / (kSlice / 8), piece = i % (kSlice / 8);
      __pipeline_memcpy_async(xs + (buffer * kTokens + t) * kStride + 8 * piece,
                              to.x + (entry[t] & 0xffffu) * to.padded + c + 8 * piece, 16);
    }
    __pipeline_commit();
  };
  float sums[4][4] = {};  // gate and up of the lower, then of the upper eight neurons
  fetch(0, 0);
  int buffer = 0;
  for (std::int64_t c = 0; c < tiles.cols; c += kSlice) {
    __pipeline_wait_prior(0);
    __syncthreads();
    rows.unpack(c, tiles.cols, ws);
    __syncthreads();
    if (c + kSlice < tiles.cols) fetch(c + kSlice, buffer ^ 1);
    if (16 * warp < n_here) {
      const __nv_bfloat16* a_at =
          xs + (buffer * kTokens + 16 * warp + lane % 16) * kStride + lane / 16 * 8;
      const __nv_bfloat16* b_at = ws + (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
      for (int k = 0; k < kSlice; k += 16) {
        std::uint32_t a[4], gate[4], up[4];
        load_matrices<false>(a, a_at + k);
        load_matrices<false>(gate, b_at + k);
        load_matrices<false>(up, b_at + kTile * kStride + k);
        multiply_add(sums[0], a, gate[0], gate[1]);
        multiply_add(sums[1], a, up[0], up[1]);
        multiply_add(sums[2], a, gate[2], gate[3]);
        multiply_add(sums[3], a, up[2], up[3]);
      }
    }
    buffer ^= 1;
  }
  __syncthreads();  // xs is free

  __nv_bfloat16* const hs = xs + warp * 16 * kTile;  // [16, kTile] of a warp
  for (int part = 0; part < 4; ++part) {
    const int t = lane / 4 + part % 2 * 8, i = part / 2 * 8 + lane % 4 * 2;
    const std::uint32_t bits = entry[16 * warp + t] >> (16 + i);
    float h[2];
    for (int v = 0; v < 2; ++v) {
      const float gate = sums[part / 2 * 2][part % 2 * 2 + v];
      const float up = sums[part / 2 * 2 + 1][part % 2 * 2 + v];
      h[v] = (bits >> v & 1u) != 0 ? phi_of(to.phi, gate) * up - mean[i + v] : 0.0f;
    }
    *reinterpret_cast<std::uint32_t*>(hs + t * kTile + i) = bf16_pair(h[0], h[1]);
  }
  __syncwarp();
  const int t = lane / 2, half = lane % 2 * 8;  // a sector per token and tile
  if (16 * warp + t < n_here) {
    const std::int64_t token = entry[16 * warp + t] & 0xffffu;
    *reinterpret_cast<uint4*>(to.h + token * to.h_cols + to.h_first + tile * kTile + half) =
        *reinterpret_cast<const uint4*>(hs + t * kTile + half);
  }
}

struct Down {
  const __nv_bfloat16* h;  // as Hidden's
  std::int64_t h_cols, h_first, n_tokens;
  std::int64_t tiles_per_group;  // even
  float* partial;                // [groups, n_tokens, cols], if there are several
  const float* base;             // [n_tokens], base_stride apart; may be y
  std::int64_t base_stride;
  float* y;
  std::int64_t y_stride;
  unsigned* done;  // [token blocks, slices]
};

// y = base + h W_down: 64 tokens and 128 columns a block, a quarter of each pair of them a warp,
// neurons in their order. Groups of tiles, where there are several, leave a part each, which the
// last block of its tokens and columns adds up in order.
template <class Format>
__global__ void __launch_bounds__(kThreads, 3)
    down_kernel(const __grid_constant__ Tiles tiles, const __grid_constant__ Down to) {
  constexpr int kPieces = kRows / 8;
  __shared__ __align__(16) std::uint8_t raw[WeightRows<Format>::kBytes];
  __shared__ __align__(16) __nv_bfloat16 hs[2][kTokens * kHiddenStride];
  __shared__ __align__(16) __nv_bfloat16 ws[kRows * kStride];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::int64_t column = std::int64_t{blockIdx.x} * kSlice;
  const std::int64_t first_token = std::int64_t{blockIdx.y} * kTokens;
  const std::int64_t begin = blockIdx.z * to.tiles_per_group;
  const std::int64_t end = min(begin + to.tiles_per_group, tiles.n);
  WeightRows<Format> rows;
  const auto fetch = [&](std::int64_t tile, int buffer) {
    rows.fetch(
        column, tiles.cols,
        [&](int r) {
          const std::int64_t of = tile + r / kTile;
          return of < end && r % kTile < tiles.count(of)
                     ? 3 * (tiles.first_neuron(of) + r % kTile) + 2
                     : std::int64_t{-1};
        },
        [&](int r) -> const WeightBytes& { return tiles.weights(tile + r / kTile); }, raw);
    for (int i = threadIdx.x; i < kTokens * kPieces; i += kThreads) {
      const int t = i / kPieces, piece = i % kPieces;
      if (tile + piece / 2 >= end) continue;
      const std::int64_t token = min(first_token + t, to.n_tokens - 1);
      __pipeline_memcpy_async(&hs[buffer][t * kHiddenStride + 8 * piece],
                              to.h + token * to.h_cols + to.h_first + tile * kTile + 8 * piece, 16);
    }
    __pipeline_commit();
  };
  const int m = warp / 2 * 32, n = warp % 2 * 64;  // a warp's tokens and columns
  float sums[2][8][4] = {};
  if (begin < end) fetch(begin, 0);
  int buffer = 0;
  for (std::int64_t tile = begin; tile < end; tile += 2) {
    __pipeline_wait_prior(0);
    __syncthreads();
    rows.unpack(column, tiles.cols, ws);
    __syncthreads();
    if (tile + 2 < end) fetch(tile + 2, buffer ^ 1);
    const int depth = tile + 1 < end ? 2 * kTile : kTile;
    for (int k = 0; k < depth; k += kTile) {
      std::uint32_t a[2][4];
      for (int i = 0; i < 2; ++i) {
        load_matrices<false>(
            a[i], &hs[buffer][(m + 16 * i + lane % 16) * kHiddenStride + k + lane / 16 * 8]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        std::uint32_t b[4];
        load_matrices<true>(b, ws + (k + lane % 16) * kStride + n + 16 * j + lane / 16 * 8);
        for (int i = 0; i < 2; ++i) {
          multiply_add(sums[i][2 * j], a[i], b[0], b[1]);
          multiply_add(sums[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
    }
    buffer ^= 1;
  }

  const bool whole = gridDim.z == 1;
  // Pairs of columns: a warp's request fills sectors.
  const auto for_each_pair = [&](auto fn) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const std::int64_t t = first_token + m + 16 * i + 8 * half + lane / 4;
          const std::int64_t c = column + n + 8 * j + lane % 4 * 2;
          if (t < to.n_tokens && c < tiles.cols) {
            fn(t, c, make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]));
          }
        }
      }
    }
  };
  const auto finish = [&](std::int64_t t, std::int64_t c, float2 sum) {
    const float2 base = *reinterpret_cast<const float2*>(to.base + t * to.base_stride + c);
    *reinterpret_cast<float2*>(to.y + t * to.y_stride + c) =
        make_float2(base.x + sum.x, base.y + sum.y);
  };
  if (whole) {
    for_each_pair(finish);
    return;
  }
  const std::int64_t part = to.n_tokens * tiles.cols;
  for_each_pair([&](std::int64_t t, std::int64_t c, float2 sum) {
    *reinterpret_cast<float2*>(to.partial + blockIdx.z * part + t * tiles.cols + c) = sum;
  });
  if (!last_block(&to.done[blockIdx.y * gridDim.x + blockIdx.x], gridDim.z)) return;
  for_each_pair([&](std::int64_t t, std::int64_t c, float2) {
    float2 sum{0, 0};
    for (unsigned g = 0; g < gridDim.z; ++g) {
      const float2 more =
          __ldcg(reinterpret_cast<const float2*>(to.partial + g * part + t * tiles.cols + c));
      sum.x += more.x;
      sum.y += more.y;
    }
    finish(t, c, sum);
  });
}

std::int64_t n_tiles(std::int64_t neurons) { return ceil_div(neurons, kTile); }
std::int64_t n_routed(const SecretMoeView& layer) {
  return layer.n_active > 0 ? layer.n_experts() : 0;
}

// Groups of the tiles of down rows: so many that the blocks fill a device.
std::int64_t tiles_per_group(const SecretMoeView& layer, std::int64_t tiles,
                             std::int64_t n_tokens) {
  const std::int64_t blocks = ceil_div(layer.d_model(), kSlice) * ceil_div(n_tokens, kTokens);
  const std::int64_t groups = std::clamp<std::int64_t>(kWantedBlocks / blocks, 1, kMaxGroups);
  return std::max<std::int64_t>(2, 2 * ceil_div(ceil_div(tiles, 2), groups));
}

std::int64_t n_groups(const SecretMoeView& layer, std::int64_t tiles, std::int64_t n_tokens) {
  return std::max<std::int64_t>(1, ceil_div(tiles, tiles_per_group(layer, tiles, n_tokens)));
}

bool one_launch(const SecretMoeView& layer) {
  return layer.n_shared() == 0 || n_routed(layer) == 0 || layer.shared.dtype == layer.experts.dtype;
}

// The pieces of the workspace, for so many tokens of a chunk.
struct Workspace {
  unsigned* done;          // [token blocks of a chunk, slices], zero between calls
  float *z, *zq, *scores;  // [n_tokens, router_rank, bypass_rank, n_experts]
  float* partial;          // [groups, n_tokens, d_model]
  __nv_bfloat16* x;        // [n_tokens, padded]
  __nv_bfloat16* h;        // [n_tokens, h_cols]
  std::uint16_t* masks;    // as TileTokens has them
  std::uint32_t* entries;
  std::int32_t* counts;
  std::int64_t padded, h_cols, stride;
  std::size_t bytes;
};

Workspace divide(const SecretMoeView& layer, std::int64_t n, std::byte* data) {
  std::size_t used = 0;
  const auto take = [&]<class T>(T*& piece, std::int64_t count) {
    piece = reinterpret_cast<T*>(data + used);
    used += (static_cast<std::size_t>(count) * sizeof(T) + 255) / 256 * 256;
  };
  const std::int64_t d_model = layer.d_model();
  const std::int64_t shared_tiles = n_tiles(layer.n_shared());
  const std::int64_t expert_tiles = n_tiles(n_routed(layer));
  Workspace w{};
  w.padded = ceil_div(d_model, kSlice) * kSlice;
  w.h_cols = kTile * (shared_tiles + expert_tiles);
  w.stride = ceil_div(n, kTokens) * kTokens;
  // First, and of a size that d_model alone gives: layers of one model share the workspace.
  take(w.done, kChunk / kTokens * ceil_div(d_model, kSlice));
  take(w.z, n * aligned_floats(layer.router_rank()));
  take(w.zq, n * aligned_floats(layer.bypass_rank()));
  take(w.scores, n * layer.n_experts());
  const std::int64_t groups = one_launch(layer) ? n_groups(layer, shared_tiles + expert_tiles, n)
                                                : std::max(n_groups(layer, shared_tiles, n),
                                                           n_groups(layer, expert_tiles, n));
  take(w.partial, groups > 1 ? groups * n * d_model : 0);
  take(w.x, n * w.padded);
  take(w.h, n * w.h_cols);
  take(w.masks, expert_tiles * w.stride);
  take(w.entries, expert_tiles * w.stride);
  take(w.counts, expert_tiles);
  w.bytes = used;
  return w;
}

dim3 grid(std::int64_t x, std::int64_t y, std::int64_t z = 1) {
  return {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
}

// The selection, and what takes none: y = b + P (Q x) where there is a bypass.
void route(const SecretMoeView& layer, ConstMatrix x, Matrix y, std::int32_t* ids,
           const Workspace& w, StreamHandle stream) {
  const std::int64_t n = x.rows;
  const bool routed = layer.n_active > 0, bypassed = !layer.bypass_p.empty();
  const Matrix z(w.z, n, layer.router_rank(), aligned_floats(layer.router_rank()));
  const Matrix zq(w.zq, n, layer.bypass_rank(), aligned_floats(layer.bypass_rank()));
  const Matrix scores(w.scores, n, layer.n_experts());
  Product inwards[2], outwards[2];
  std::size_t n_products = 0;
  const auto add = [&](const Product& in, const Product& out) {
    inwards[n_products] = in;
    outwards[n_products++] = out;
  };
  if (routed) {
    add({layer.router_v, x, nullptr, z}, {layer.router_u, z, layer.router_bias.data(), scores});
  }
  if (bypassed) add({layer.bypass_q, x, nullptr, zq}, {layer.bypass_p, zq, layer.bias.data(), y});
  linear({inwards, n_products}, stream);
  linear({outwards, n_products}, stream);
  if (routed) top_k(scores, layer.n_active, ids, stream);
}

void run_tiles(const SecretMoeView& layer, const Tiles& tiles, DType dtype, const Hidden& hidden,
               Down down, StreamHandle stream) {
  down.tiles_per_group = tiles_per_group(layer, tiles.n, hidden.n_tokens);
  const std::int64_t token_blocks = ceil_div(hidden.n_tokens, kTokens);
  visit_format(dtype, [&]<class Format>() {
    if (tiles.n > 0) {
      check(cudaFuncSetAttribute(hidden_kernel<Format>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 kHiddenBytes<Format>),
            "secret_moe hidden");
      hidden_kernel<Format>
          <<<grid(tiles.n, token_blocks), kThreads, kHiddenBytes<Format>, stream>>>(tiles, hidden);
      check_launch("secret_moe hidden");
    }
    down_kernel<Format><<<grid(ceil_div(tiles.cols, kSlice), token_blocks,
                               n_groups(layer, tiles.n, hidden.n_tokens)),
                          kThreads, 0, stream>>>(tiles, down);
    check_launch("secret_moe down");
  });
}

void run_chunk(const SecretMoeView& layer, ConstMatrix x, Matrix y, std::int32_t* ids, bool lists,
               const Workspace& w, StreamHandle stream) {
  route(layer, x, y, ids, w, stream);
  round_kernel<<<grid(ceil_div(w.padded, 4 * kRoundThreads), x.rows), kRoundThreads, 0, stream>>>(
      x, w.padded, w.x);
  check_launch("secret_moe round");
  const TileTokens wanted{w.masks, lists ? w.entries : nullptr, w.counts, n_tiles(n_routed(layer)),
                          w.stride};
  tile_tokens(ids, x.rows, layer.n_active, wanted, stream);
  if (lists && w.h_cols > 0) {
    check(
        cudaMemsetAsync(w.h, 0, static_cast<std::size_t>(x.rows * w.h_cols) * sizeof(*w.h), stream),
        "secret_moe hidden");
  }
  const auto bytes = [](const WeightView& m) {
    return WeightBytes{reinterpret_cast<const std::uint8_t*>(m.data), m.bytes()};
  };
  const std::int64_t n_shared = layer.n_shared(), n_experts = n_routed(layer);
  Tiles all{bytes(layer.shared), bytes(layer.experts), n_shared, n_experts, n_tiles(n_shared), 0,
            layer.d_model()};
  all.n = all.shared_tiles + n_tiles(n_experts);
  Hidden hidden{layer.phi, w.x,
                w.padded,  layer.expert_mean.data(),
                w.masks,   lists ? w.entries : nullptr,
                w.counts,  w.stride,
                x.rows,    w.h,
                w.h_cols,  0};
  const bool bypassed = !layer.bypass_p.empty();
  Down down{w.h,
            w.h_cols,
            0,
            x.rows,
            0,
            w.partial,
            bypassed ? y.data : layer.bias.data(),
            bypassed ? y.stride : 0,
            y.data,
            y.stride,
            w.done};
  if (one_launch(layer)) {
    const DType dtype = n_shared > 0 ? layer.shared.dtype : layer.experts.dtype;
    run_tiles(layer, all, dtype, hidden, down, stream);
    return;
  }
  Tiles shared = all, experts = all;
  shared.n_experts = 0;
  shared.n = all.shared_tiles;
  experts.n_shared = experts.shared_tiles = 0;
  experts.n = all.n - all.shared_tiles;
  run_tiles(layer, shared, layer.shared.dtype, hidden, down, stream);
  hidden.h_first = down.h_first = kTile * all.shared_tiles;
  down.base = y.data;
  down.base_stride = y.stride;
  run_tiles(layer, experts, layer.experts.dtype, hidden, down, stream);
}

}  // namespace

MoePath choose_secret_moe_path(const SecretMoeView& layer) {
  const auto n = static_cast<double>(layer.n_experts());
  if (n == 0 || layer.n_active == 0) return MoePath::Masked;
  const double wanted = 1 - std::pow(1 - static_cast<double>(layer.n_active) / n, kTile);
  return wanted < 0.8 ? MoePath::Grouped : MoePath::Masked;
}

std::size_t secret_moe_batch_workspace(const SecretMoeView& layer, std::int64_t n_tokens) {
  return divide(layer, std::min(n_tokens, kChunk), nullptr).bytes;
}

void secret_moe_batch(const SecretMoeView& layer, ConstMatrix x, Matrix y, std::int32_t* selected,
                      std::byte* workspace, StreamHandle stream, MoePath path) {
  kernels::check_shapes(layer);
  const std::int64_t d_model = layer.d_model();
  require<ShapeError>(x.cols == d_model && y.cols == d_model && y.rows == x.rows,
                      "secret MoE: x [{}, {}] and y [{}, {}], expected [n, {}]", x.rows, x.cols,
                      y.rows, y.cols, d_model);
  require<ShapeError>(d_model % 4 == 0, "secret MoE: d_model is {}, expected a multiple of 4",
                      d_model);
  require<ShapeError>(path != MoePath::Gather,
                      "secret MoE: expected grouped or masked for a batch on a GPU");
  for (const ConstMatrix& m : {x, ConstMatrix(y)}) require_aligned_rows("secret MoE", m);
  for (const WeightView* w : {&layer.shared, &layer.experts}) require_weights("secret MoE", *w);
  if (path == MoePath::Auto) path = choose_secret_moe_path(layer);
  const Workspace w = divide(layer, std::min(x.rows, kChunk), workspace);
  for (std::int64_t first = 0; first < x.rows; first += kChunk) {
    const std::int64_t n = std::min(kChunk, x.rows - first);
    run_chunk(layer, x.slice(first, n), y.slice(first, n), selected + first * layer.n_active,
              path == MoePath::Grouped, w, stream);
  }
}

}  // namespace moesaic::cuda
