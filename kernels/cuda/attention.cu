#include <algorithm>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/base/warp.cuh"

namespace moesaic::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kSplit = 256;  // keys of a block
constexpr int kPages = kSplit / kKvPage;
constexpr int kKeys = 4;      // that a warp has in registers at once
constexpr int kMaxHeads = 4;  // that share a block's keys
constexpr int kThreads = 256;

struct Attention {
  ConstMatrix q;
  TokenPlaces places;
  PagedKv cache;
  int n_heads;
  float scale;
  std::int64_t window;
  std::int64_t n_splits;
  float* partial;  // [n_tokens, n_heads, n_splits, 2 + head_dim]: maximum, sum, Σ e^(s − maximum) v

  __device__ std::int64_t first_key(std::int64_t position) const {
    return window == 0 ? 0 : max(position - window + 1, std::int64_t{0});
  }
  __device__ float* part(std::int64_t t, int head, std::int64_t split) const {
    return partial + ((t * n_heads + head) * n_splits + split) * (2 + cache.head_dim);
  }
};

// A softmax sum on its way: Σ e^(s − maximum) and Σ e^(s − maximum) v. Lane l has elements l + 32
// i.
template <int kPer>
struct Running {
  float maximum = -INFINITY, sum = 0, v[kPer] = {};

  __device__ void rescale(float to) {
    const float factor = maximum == -INFINITY ? 0.0f : expf(maximum - to);
    maximum = to;
    sum *= factor;
    for (float& x : v) x *= factor;
  }
};

// The largest heads take twice the registers.
template <int kPer, int kHeads>
constexpr int kMinBlocks = min_blocks(kPer* kHeads >= 32 ? 2 * kWarps : kWarps);

// Block (split, heads of one KV head, token).
template <int kPer, int kHeads>
__global__ void __launch_bounds__(kWarps* kWarp, (kMinBlocks<kPer, kHeads>))
    attention_split_kernel(const __grid_constant__ Attention a) {
  __shared__ float merged[kWarps][kHeads][2 + kPer * kWarp];
  __shared__ const float* pages[kPages];  // of the block's keys
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int dim = a.cache.head_dim, per_kv = a.n_heads / a.cache.n_kv_heads;
  const int groups = (per_kv + kHeads - 1) / kHeads;
  const int kv_head = blockIdx.y / groups, first_head = blockIdx.y % groups * kHeads;
  const int heads = min(kHeads, per_kv - first_head);
  const std::int64_t t = blockIdx.z, position = a.places.positions[t];
  const std::int64_t begin = max(a.first_key(position), std::int64_t{blockIdx.x} * kSplit);
  const std::int64_t end = min(position + 1, (std::int64_t{blockIdx.x} + 1) * kSplit);
  if (begin >= end) return;

  const int head0 = kv_head * per_kv + first_head;
  float q[kHeads][kPer];
  for (int h = 0; h < kHeads; ++h) {
    for (int i = 0; i < kPer; ++i) {
      const int e = lane + kWarp * i;
      const bool inside = h < heads && e < dim;
      q[h][i] = inside ? a.q.data[t * a.q.stride + std::int64_t{head0 + h} * dim + e] * a.scale : 0;
    }
  }
  const std::int64_t step = std::int64_t{a.cache.n_kv_heads} * dim;
  const std::int64_t page = std::int64_t{blockIdx.x} * kPages + threadIdx.x;
  if (threadIdx.x < kPages && page * kKvPage < end) {
    pages[threadIdx.x] = a.cache.pages[a.places.slots[t] * a.cache.pages_per_slot + page] +
                         std::int64_t{kv_head} * dim;
  }
  __syncthreads();
  Running<kPer> run[kHeads];
  for (std::int64_t first = begin + warp * kKeys; first < end; first += kWarps * kKeys) {
    float k[kKeys][kPer], v[kKeys][kPer];
    for (int j = 0; j < kKeys; ++j) {
      const std::int64_t key = first + j;
      const float* at = key < end ? pages[key % kSplit / kKvPage] + key % kKvPage * step : nullptr;
      for (int i = 0; i < kPer; ++i) {
        const int e = lane + kWarp * i;
        const bool inside = key < end && e < dim;
        k[j][i] = inside ? at[a.cache.keys + e] : 0;
        v[j][i] = inside ? at[a.cache.values + e] : 0;
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      float score[kKeys], maximum = run[h].maximum;
      for (int j = 0; j < kKeys; ++j) {
        float dot = 0;
        for (int i = 0; i < kPer; ++i) dot = fmaf(q[h][i], k[j][i], dot);
        score[j] = warp_sum(dot);
        if (first + j >= end) score[j] = -INFINITY;
        maximum = fmaxf(maximum, score[j]);
      }
      run[h].rescale(maximum);
      for (int j = 0; j < kKeys; ++j) {
        const float p = expf(score[j] - maximum);
        run[h].sum += p;
        for (int i = 0; i < kPer; ++i) run[h].v[i] = fmaf(p, v[j][i], run[h].v[i]);
      }
    }
  }

  for (int h = 0; h < kHeads; ++h) {
    float* to = merged[warp][h];
    if (lane == 0) to[0] = run[h].maximum, to[1] = run[h].sum;
    for (int i = 0; i < kPer; ++i) to[2 + lane + kWarp * i] = run[h].v[i];
  }
  __syncthreads();
  // Warp w puts heads w, w + kWarps, … together.
  for (int h = warp; h < heads; h += kWarps) {
    float maximum = -INFINITY, sum = 0;
    for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, merged[w][h][0]);
    for (int w = 0; w < kWarps; ++w) sum += merged[w][h][1] * expf(merged[w][h][0] - maximum);
    float* to = a.part(t, head0 + h, blockIdx.x);
    if (lane == 0) to[0] = maximum, to[1] = sum;
    for (int e = lane; e < dim; e += kWarp) {
      float total = 0;
      for (int w = 0; w < kWarps; ++w) {
        total += merged[w][h][2 + e] * expf(merged[w][h][0] - maximum);
      }
      to[2 + e] = total;
    }
  }
}

// Block (head, token), a thread per element.
__global__ void __launch_bounds__(kThreads)
    attention_merge_kernel(const __grid_constant__ Attention a, float* out, std::int64_t stride) {
  const std::int64_t t = blockIdx.y, position = a.places.positions[t];
  const int head = blockIdx.x, dim = a.cache.head_dim, e = threadIdx.x;
  if (e >= dim) return;
  const std::int64_t begin = a.first_key(position) / kSplit, end = position / kSplit + 1;
  float maximum = -INFINITY, sum = 0, total = 0;
  for (std::int64_t s = begin; s < end; ++s) maximum = fmaxf(maximum, a.part(t, head, s)[0]);
  for (std::int64_t s = begin; s < end; ++s) {
    const float* part = a.part(t, head, s);
    const float factor = expf(part[0] - maximum);
    sum = fmaf(part[1], factor, sum);
    total = fmaf(part[2 + e], factor, total);
  }
  out[t * stride + std::int64_t{head} * dim + e] = total / sum;
}

__global__ void __launch_bounds__(kThreads)
    store_kv_kernel(ConstMatrix k, ConstMatrix v, TokenPlaces places, PagedKv cache) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x, t = blockIdx.y;
  if (i >= k.cols) return;
  const std::int32_t position = places.positions[t];
  float* at = cache.pages[places.slots[t] * cache.pages_per_slot + position / kKvPage] +
              position % kKvPage * k.cols + i;
  at[cache.keys] = k.data[t * k.stride + i];
  at[cache.values] = v.data[t * v.stride + i];
}

template <int kPer>
void launch_split(const Attention& a, StreamHandle stream) {
  const int per_kv = a.n_heads / a.cache.n_kv_heads;
  const auto launch = [&]<int kHeads>() {
    const dim3 grid(static_cast<unsigned>(a.n_splits),
                    static_cast<unsigned>(a.cache.n_kv_heads * ceil_div(per_kv, kHeads)),
                    static_cast<unsigned>(a.q.rows));
    attention_split_kernel<kPer, kHeads><<<grid, kWarps * kWarp, 0, stream>>>(a);
    check_launch("attention split");
  };
  if (per_kv == 1) return launch.template operator()<1>();
  launch.template operator()<kMaxHeads>();
}

std::int64_t splits(const AttentionShape& shape) { return ceil_div(shape.max_positions, kSplit); }

}  // namespace

void store_kv(ConstMatrix k, ConstMatrix v, const TokenPlaces& places, const PagedKv& cache,
              StreamHandle stream) {
  require<ShapeError>(k.cols == cache.row() && v.cols == k.cols && v.rows == k.rows,
                      "store_kv: k is [{}, {}], v is [{}, {}], expected rows of {}", k.rows, k.cols,
                      v.rows, v.cols, cache.row());
  if (k.rows == 0 || k.cols == 0) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(k.cols, kThreads)), static_cast<unsigned>(k.rows));
  store_kv_kernel<<<grid, kThreads, 0, stream>>>(k, v, places, cache);
  check_launch("store_kv");
}

std::size_t attention_workspace(const AttentionShape& shape, std::int64_t n_tokens, int head_dim) {
  return static_cast<std::size_t>(n_tokens * shape.n_heads * splits(shape) * (2 + head_dim)) *
         sizeof(float);
}

void attention(ConstMatrix q, const TokenPlaces& places, const PagedKv& cache,
               const AttentionShape& shape, Matrix out, std::byte* workspace, StreamHandle stream) {
  const int dim = cache.head_dim;
  require<ShapeError>(dim > 0 && dim <= 256, "attention: head_dim is {}, expected 1 to 256", dim);
  require<ShapeError>(cache.n_kv_heads > 0 && shape.n_heads % cache.n_kv_heads == 0,
                      "attention: {} heads over {} KV heads, expected a multiple", shape.n_heads,
                      cache.n_kv_heads);
  require<ShapeError>(
      q.cols == std::int64_t{shape.n_heads} * dim && out.cols == q.cols && out.rows == q.rows,
      "attention: q is [{}, {}], out is [{}, {}], expected rows of {}", q.rows, q.cols, out.rows,
      out.cols, std::int64_t{shape.n_heads} * dim);
  require<ShapeError>(shape.max_positions > 0 && shape.max_positions <= cache.capacity(),
                      "attention: up to {} positions, expected 1 to {}", shape.max_positions,
                      cache.capacity());
  constexpr std::int64_t kMaxTokens = 65535;  // CUDA's limit of a grid's third side
  require<ShapeError>(q.rows <= kMaxTokens, "attention: {} tokens, expected at most {}", q.rows,
                      kMaxTokens);
  if (q.rows == 0) return;
  const Attention a{q,           places,       cache,         shape.n_heads,
                    shape.scale, shape.window, splits(shape), reinterpret_cast<float*>(workspace)};
  if (dim <= 64) {
    launch_split<2>(a, stream);
  } else if (dim <= 128) {
    launch_split<4>(a, stream);
  } else {
    launch_split<8>(a, stream);
  }
  const dim3 grid(static_cast<unsigned>(shape.n_heads), static_cast<unsigned>(q.rows));
  attention_merge_kernel<<<grid, kThreads, 0, stream>>>(a, out.data, out.stride);
  check_launch("attention merge");
}

}  // namespace moesaic::cuda
