#include <algorithm>
#include <numbers>

#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/base/tensor_core.cuh"
#include "kernels/cuda/base/warp.cuh"
#include "kernels/cuda/prompt_attention.h"

namespace moesaic::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTokens = 16 * kWarps;            // of a block
constexpr int kTile = 4096;                     // elements of keys or values at a time
constexpr int kVectors = kTile / 4 / kThreads;  // of four floats, of a thread
constexpr std::int32_t kNone = 0x7fffffff;      // no slot, no position

struct PromptAttention {
  ConstMatrix q;
  TokenPlaces places;
  PagedKv cache;
  Matrix out;
  float scale;  // times log2(e)
  std::int64_t window;

  __device__ std::int32_t first_key(std::int32_t position) const {
    return window == 0 ? 0 : static_cast<std::int32_t>(max(position - window + 1, std::int64_t{0}));
  }
};

__device__ std::int32_t warp_least(std::int32_t v) { return __reduce_min_sync(kAllLanes, v); }
__device__ std::int32_t warp_most(std::int32_t v) { return __reduce_max_sync(kAllLanes, v); }

// Rows of kDim bfloat16 in shared memory, in chunks of 16 bytes whose order depends on the row:
// eight rows' chunks of one place lie in different banks.
template <int kDim>
__device__ int place(int row, int chunk) {
  return row * kDim + (chunk ^ (row & 7)) * 8;
}

template <int kDim>
__device__ void store_four(__nv_bfloat16* rows, int row, int col, const float4& v) {
  *reinterpret_cast<std::uint64_t*>(rows + place<kDim>(row, col / 8) + col % 8) =
      bf16_four(v.x, v.y, v.z, v.w);
}

// Keys or values of one KV head, `step` floats apart, on their way to shared memory: rows from
// `count` on and columns from `dim` on are zero and not read.
template <int kDim>
struct Tile {
  // A thread has the same four columns of rows that stand so far apart.
  static constexpr int kApart = kThreads / (kDim / 4);
  static_assert(kThreads % (kDim / 4) == 0);
  float4 v[kVectors];

  __device__ static int row() { return threadIdx.x / (kDim / 4); }
  __device__ static int col() { return threadIdx.x % (kDim / 4) * 4; }
  __device__ void fetch(const float* from, int step, int count, int dim) {
    from += row() * step + col();
    for (int i = 0; i < kVectors; ++i) {
      v[i] = make_float4(0, 0, 0, 0);
      if (row() + i * kApart < count && col() < dim) {
        v[i] = *reinterpret_cast<const float4*>(from + i * kApart * step);
      }
    }
  }
  __device__ void store(__nv_bfloat16* rows) const {
    for (int i = 0; i < kVectors; ++i) store_four<kDim>(rows, row() + i * kApart, col(), v[i]);
  }
};

// What a warp's 16 tokens have seen so far: lane's rows are g = lane / 4 and g + 8.
template <int kDim>
struct Seen {
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};  // sum: of the lane's own keys
  float v[kDim / 8][4] = {};

  // Scores become weights e^(s − maximum); what was seen before is brought to the new maximum.
  template <int kTiles>
  __device__ void add(float (&s)[kTiles][4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = maximum[r];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) most = fmaxf(most, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      for (int offset = 1; offset < 4; offset *= 2) {
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, offset));
      }
      const float base = most == -INFINITY ? 0.0f : most;  // a token that has seen no key yet
      const float factor = exp2f(maximum[r] - base);
      maximum[r] = most;
      sum[r] *= factor;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) v[n][2 * r] *= factor, v[n][2 * r + 1] *= factor;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        for (int e = 2 * r; e < 2 * r + 2; ++e) sum[r] += s[n][e] = exp2f(s[n][e] - base);
      }
    }
  }
};

// Block (64 tokens, head); those that have most keys begin first.
template <int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    prompt_attention_kernel(const __grid_constant__ PromptAttention a) {
  constexpr int kKeys = kTile / kDim;
  static_assert(kKvPage % kKeys == 0);
  __shared__ __align__(16) __nv_bfloat16 queries[kTokens * kDim], keys[kTile], values[kTile];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int dim = a.cache.head_dim, head = blockIdx.y;
  const std::int64_t first = std::int64_t{gridDim.x - 1 - blockIdx.x} * kTokens;
  const int step = a.cache.n_kv_heads * dim;
  const int kv_head = head / (gridDim.y / a.cache.n_kv_heads);

  for (int i = threadIdx.x; i < kTokens * kDim / 4; i += kThreads) {
    const int row = i / (kDim / 4), col = i % (kDim / 4) * 4;
    float4 v = make_float4(0, 0, 0, 0);
    if (first + row < a.q.rows && col < dim) {
      v = *reinterpret_cast<const float4*>(a.q.data + (first + row) * a.q.stride +
                                           std::int64_t{head} * dim + col);
    }
    store_four<kDim>(queries, row, col, v);
  }
  // Every warp knows the places of all 64 tokens: lane l those of l and l + 32.
  std::int32_t slots[2], positions[2];
  for (int i = 0; i < 2; ++i) {
    const std::int64_t t = first + lane + kWarp * i;
    slots[i] = t < a.q.rows ? a.places.slots[t] : kNone;
    positions[i] = t < a.q.rows ? a.places.positions[t] : kNone;
  }

  Seen<kDim> seen;
  // The sequences of the block's tokens, by ascending slot.
  for (std::int32_t slot = warp_least(min(slots[0], slots[1])); slot != kNone;) {
    std::int32_t begin = kNone, last = -1, next = kNone;
    for (int i = 0; i < 2; ++i) {
      if (slots[i] == slot) {
        begin = min(begin, a.first_key(positions[i]));
        last = max(last, positions[i]);
      } else if (slots[i] > slot) {
        next = min(next, slots[i]);
      }
    }
    begin = warp_least(begin) / kKeys * kKeys;  // tiles never cross a page
    last = warp_most(last);
    next = warp_least(next);
    std::int32_t from[2], to[2];  // keys that the lane's rows see
    for (int r = 0; r < 2; ++r) {
      const int token = warp % 2 * 16 + lane / 4 + 8 * r;
      const std::int32_t token_slot = __shfl_sync(kAllLanes, warp < 2 ? slots[0] : slots[1], token);
      const std::int32_t position =
          __shfl_sync(kAllLanes, warp < 2 ? positions[0] : positions[1], token);
      from[r] = token_slot == slot ? a.first_key(position) : kNone;
      to[r] = token_slot == slot ? position : -1;
    }
    const std::int32_t warp_from = warp_least(min(from[0], from[1]));
    const std::int32_t warp_to = warp_most(max(to[0], to[1]));

    const auto at = [&](std::int32_t key) {
      const std::int64_t page = slot * a.cache.pages_per_slot + key / kKvPage;
      return a.cache.pages[page] + (key % kKvPage * step + kv_head * dim);
    };
    Tile<kDim> tile;
    tile.fetch(at(begin) + a.cache.keys, step, last + 1 - begin, dim);
    for (std::int32_t key = begin; key <= last; key += kKeys) {
      tile.store(keys);
      tile.fetch(at(key) + a.cache.values, step, last + 1 - key, dim);
      __syncthreads();
      const bool sees = key <= warp_to && key + kKeys > warp_from;
      float s[kKeys / 8][4] = {};
      if (sees) {
#pragma unroll 4  // more of them cost registers that the largest heads do not have
        for (int k = 0; k < kDim / 16; ++k) {
          std::uint32_t q[4];
          load_matrices<false>(q, queries + place<kDim>(16 * warp + lane % 16, 2 * k + lane / 16));
#pragma unroll
          for (int n = 0; n < kKeys / 16; ++n) {
            std::uint32_t b[4];
            load_matrices<false>(
                b, keys + place<kDim>(16 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
            multiply_add(s[2 * n], q, b[0], b[1]);
            multiply_add(s[2 * n + 1], q, b[2], b[3]);
          }
        }
        for (int n = 0; n < kKeys / 8; ++n) {
          for (int e = 0; e < 4; ++e) {
            const int k = key + 8 * n + lane % 4 * 2 + e % 2;
            const bool visible = k >= from[e / 2] && k <= to[e / 2];
            s[n][e] = visible ? s[n][e] * a.scale : -INFINITY;
          }
        }
        seen.add(s);
      }
      tile.store(values);
      if (key + kKeys <= last) {
        tile.fetch(at(key + kKeys) + a.cache.keys, step, last + 1 - key - kKeys, dim);
      }
      __syncthreads();
      if (sees) {
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) {
          const std::uint32_t p[4] = {bf16_pair(s[2 * k][0], s[2 * k][1]),
                                      bf16_pair(s[2 * k][2], s[2 * k][3]),
                                      bf16_pair(s[2 * k + 1][0], s[2 * k + 1][1]),
                                      bf16_pair(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
          for (int n = 0; n < kDim / 16; ++n) {
            std::uint32_t b[4];
            load_matrices<true>(b, values + place<kDim>(16 * k + lane % 16, 2 * n + lane / 16));
            multiply_add(seen.v[2 * n], p, b[0], b[1]);
            multiply_add(seen.v[2 * n + 1], p, b[2], b[3]);
          }
        }
      }
    }
    slot = next;
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = seen.sum[r];
    for (int offset = 1; offset < 4; offset *= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, offset);
    }
    const std::int64_t t = first + 16 * warp + lane / 4 + 8 * r;
    if (t >= a.q.rows) continue;
    float* out = a.out.data + t * a.out.stride + std::int64_t{head} * dim;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const int col = 8 * n + lane % 4 * 2;
      if (col >= dim) continue;
      // An ordinary store, which the compiler does not take apart.
      __stwb(reinterpret_cast<float2*>(out + col),
             make_float2(seen.v[n][2 * r] / sum, seen.v[n][2 * r + 1] / sum));
    }
  }
}

}  // namespace

void prompt_attention(ConstMatrix q, const TokenPlaces& places, const PagedKv& cache,
                      const AttentionShape& shape, Matrix out, StreamHandle stream) {
  const int dim = cache.head_dim;
  require<ShapeError>(dim > 0 && dim <= 256 && dim % 4 == 0,
                      "prompt attention: head_dim is {}, expected a multiple of 4 up to 256", dim);
  require<ShapeError>(
      cache.n_kv_heads > 0 && shape.n_heads > 0 && shape.n_heads % cache.n_kv_heads == 0,
      "prompt attention: {} heads over {} KV heads, expected a multiple", shape.n_heads,
      cache.n_kv_heads);
  require<ShapeError>(
      q.cols == std::int64_t{shape.n_heads} * dim && out.cols == q.cols && out.rows == q.rows,
      "prompt attention: q is [{}, {}], out is [{}, {}], expected rows of {}", q.rows, q.cols,
      out.rows, out.cols, std::int64_t{shape.n_heads} * dim);
  require_aligned_rows("prompt attention", q);
  require_aligned_rows("prompt attention", out);
  if (q.rows == 0) return;
  const PromptAttention a{
      q, places, cache, out, shape.scale * std::numbers::log2e_v<float>, shape.window};
  const dim3 grid(static_cast<unsigned>(ceil_div(q.rows, kTokens)),
                  static_cast<unsigned>(shape.n_heads));
  if (dim <= 64) {
    prompt_attention_kernel<64><<<grid, kThreads, 0, stream>>>(a);
  } else if (dim <= 128) {
    prompt_attention_kernel<128><<<grid, kThreads, 0, stream>>>(a);
  } else {
    prompt_attention_kernel<256><<<grid, kThreads, 0, stream>>>(a);
  }
  check_launch("prompt attention");
}

}  // namespace moesaic::cuda
