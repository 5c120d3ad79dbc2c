#include <algorithm>

#include "kernels/cuda/activate.cuh"
#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/last_block.cuh"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/secret_moe.h"
#include "kernels/cuda/top_k.cuh"

namespace moesaic::cuda {
namespace {

using kernels::Activation;
using kernels::SecretMoeView;

constexpr int kRouteWarps = 4;
constexpr int kNeuronWarps = 4;
constexpr int kScatterWarps = kGroup / kWarp;  // a thread per column of a slice
constexpr int kScatterDepth = 4;               // rows on their way to a warp

// Scores (and the bypass) by a warp per row, then the top k by the block that finishes last.
template <class Format>
__global__ void __launch_bounds__(kRouteWarps* kWarp, min_blocks(kRouteWarps))
    route_kernel(const __grid_constant__ RowProducts products, const float* scores,
                 std::int64_t n_experts, std::int64_t k, std::int32_t* ids, unsigned* done) {
  extern __shared__ __align__(16) std::uint8_t staged[];
  __shared__ TopKShared shared;
  const int warp = threadIdx.x / kWarp;
  const std::int64_t row = std::int64_t{blockIdx.x} * kRouteWarps + warp;
  if (row < products.rows) {
    row_times_tokens<Format, 1>(products, row, 0, staged + warp * RowStream<Format>::kSharedBytes,
                                threadIdx.x % kWarp);
  }
  if (last_block(done, gridDim.x)) block_top_k(scores, n_experts, k, ids, shared);
}

// Neurons of one launch: n_shared of one matrix, then those that ids names of another.
struct Neurons {
  WeightBytes shared, experts;
  std::int64_t n_shared, n;
  const std::int32_t* ids;
  const float* mean;

  __device__ bool is_shared(std::int64_t j) const { return j < n_shared; }
  __device__ std::int64_t index(std::int64_t j) const {
    return is_shared(j) ? j : ids[j - n_shared];
  }
  __device__ const WeightBytes& weights(std::int64_t j) const {
    return is_shared(j) ? shared : experts;
  }
};

// h_j = φ(w_gate · x)(w_up · x) − μ: a warp per neuron, whose gate and up rows are one run.
template <class Format>
__global__ void __launch_bounds__(kNeuronWarps* kWarp, min_blocks(kNeuronWarps))
    neurons_kernel(const __grid_constant__ Neurons neurons, Activation phi, const float* x,
                   std::int64_t cols, float* h) {
  __shared__ __align__(16) std::uint8_t staged[kNeuronWarps * RowStream<Format>::kSharedBytes];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::int64_t j = std::int64_t{blockIdx.x} * kNeuronWarps + warp;
  if (j >= neurons.n) return;
  const std::int64_t index = neurons.index(j);
  const std::int64_t row_bytes = cols / Format::kElems * Format::kBytes;
  float gate = 0, up = 0;
  RowStream<Format>::run(neurons.weights(j), 3 * index * row_bytes, 2 * cols,
                         staged + warp * RowStream<Format>::kSharedBytes, lane,
                         [&](std::int64_t c, std::int64_t left, const float(&w)[8]) {
                           for (int v = 0; v < Format::kVectors; ++v) {
                             const int at = Format::column(lane, v);
                             const bool is_up = c + at >= cols;
                             float xs[Format::kWidth], dot = 0;
                             load_floats<Format::kWidth>(x + c + at - (is_up ? cols : 0), left - at,
                                                         xs);
                             for (int i = 0; i < Format::kWidth; ++i) {
                               dot = fmaf(w[Format::kWidth * v + i], xs[i], dot);
                             }
                             (is_up ? up : gate) += dot;
                           }
                         });
  gate = warp_sum(gate);
  up = warp_sum(up);
  if (lane == 0) {
    h[j] = phi_of(phi, gate) * up - (neurons.is_shared(j) ? 0.0f : neurons.mean[index]);
  }
}

// Where the parts of Σ h_j w_down,j go, and what the last block makes of them.
struct Scatter {
  float* h;
  std::int64_t cols;
  std::int64_t neurons_per_group;
  float* partial;              // [n_partials, cols]
  std::int64_t first_partial;  // of this launch
  std::int64_t n_partials;     // of all launches
  const float* base;           // added in the end
  float* y;                    // null: another launch follows
  unsigned* done;
};

// Block (s, g) sums the columns of slice s over the neurons of group g, each of its warps every
// kScatterWarps-th of them. No atomic additions: a part per group, which the last block adds up in
// order.
template <class Format>
__global__ void __launch_bounds__(kScatterWarps* kWarp, min_blocks(kScatterWarps))
    scatter_kernel(const __grid_constant__ Neurons neurons, const __grid_constant__ Scatter to) {
  constexpr int kBuffer = staged_bytes(kGroup / Format::kElems * Format::kBytes);
  __shared__ __align__(16) std::uint8_t staged[kScatterWarps * kScatterDepth * kBuffer];
  __shared__ float sums[kScatterWarps][kGroup];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::int64_t slice = std::int64_t{blockIdx.x} * kGroup;
  const int count = static_cast<int>(min(to.cols - slice, static_cast<std::int64_t>(kGroup)));
  const std::int64_t row_bytes = to.cols / Format::kElems * Format::kBytes;
  const std::int64_t begin = blockIdx.y * to.neurons_per_group;
  const std::int64_t end = min(begin + to.neurons_per_group, neurons.n);
  float sum[8] = {};
  for (std::int64_t first = begin + warp; first < end; first += kScatterWarps * kScatterDepth) {
    const std::uint8_t* at[kScatterDepth];
#pragma unroll
    for (int d = 0; d < kScatterDepth; ++d) {
      const std::int64_t j = first + d * kScatterWarps;
      at[d] = staged;
      if (j >= end) continue;
      const std::int64_t from = (3 * neurons.index(j) + 2) * row_bytes;
      at[d] = stage(neurons.weights(j), from + slice / Format::kElems * Format::kBytes,
                    from + (slice + count) / Format::kElems * Format::kBytes,
                    staged + (warp * kScatterDepth + d) * kBuffer, lane);
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncwarp();
#pragma unroll
    for (int d = 0; d < kScatterDepth; ++d) {
      const std::int64_t j = first + d * kScatterWarps;
      if (j >= end) continue;
      float w[8];
      Format::unpack(at[d], lane, count, w);
      const float h = to.h[j];
      for (int i = 0; i < 8; ++i) sum[i] = fmaf(h, w[i], sum[i]);
    }
    __syncwarp();  // before the buffers are written again
  }
  for (int v = 0; v < Format::kVectors; ++v) {
    for (int i = 0; i < Format::kWidth; ++i) {
      sums[warp][Format::column(lane, v) + i] = sum[Format::kWidth * v + i];
    }
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < count) {
    float total = 0;
    for (int w = 0; w < kScatterWarps; ++w) total += sums[w][threadIdx.x];
    to.partial[(to.first_partial + blockIdx.y) * to.cols + slice + threadIdx.x] = total;
  }
  if (to.y == nullptr || !last_block(to.done, gridDim.x * gridDim.y)) return;
  for (std::int64_t c = threadIdx.x; c < to.cols; c += blockDim.x) {
    float total = to.base[c];
    for (std::int64_t p = 0; p < to.n_partials; ++p) total += __ldcg(&to.partial[p * to.cols + c]);
    to.y[c] = total;
  }
}

WeightBytes bytes_of(const WeightView& w) {
  return {reinterpret_cast<const std::uint8_t*>(w.data), w.bytes()};
}

// Neurons that one group of the scatter sums up, for a launch of n. A group leaves a part of
// d_model floats, written and read again: as many groups as keep that within 3 % of the neurons'
// weights, and no fewer neurons than the warps of a block.
std::int64_t neurons_per_group(const WeightView& w, std::int64_t n) {
  const std::int64_t traffic = 2 * w.cols * std::int64_t{sizeof(float)};
  const std::int64_t groups =
      std::max<std::int64_t>(1, 3 * n * 3 * w.row_bytes() / (100 * traffic));
  return std::max<std::int64_t>(kScatterWarps, ceil_div(n, groups));
}

std::int64_t n_groups(const WeightView& w, std::int64_t n) {
  return n == 0 ? 0 : ceil_div(n, neurons_per_group(w, n));
}

bool one_launch(const SecretMoeView& layer) {
  return layer.n_shared() == 0 || layer.n_active == 0 || layer.shared.dtype == layer.experts.dtype;
}

const WeightView& any_neurons(const SecretMoeView& layer) {
  return layer.n_shared() > 0 ? layer.shared : layer.experts;
}

std::int64_t n_partials(const SecretMoeView& layer) {
  const std::int64_t n = layer.n_shared() + layer.n_active;
  if (n == 0) return 0;
  if (one_launch(layer)) return n_groups(any_neurons(layer), n);
  return n_groups(layer.shared, layer.n_shared()) + n_groups(layer.experts, layer.n_active);
}

// The pieces of the workspace.
struct Workspace {
  unsigned* done;  // [2], zero between calls
  float* z;        // [router_rank]
  float* zq;       // [bypass_rank]
  float* scores;   // [n_experts]
  float* h;        // [n_shared + n_active]
  float* partial;  // [n_partials, d_model]
  std::size_t bytes;
};

Workspace divide(const SecretMoeView& layer, std::byte* data) {
  std::size_t used = 0;
  const auto take = [&](std::int64_t n) {
    std::byte* piece = data + used;
    used += (static_cast<std::size_t>(n) * sizeof(float) + 255) / 256 * 256;
    return reinterpret_cast<float*>(piece);
  };
  Workspace w{};
  w.done = reinterpret_cast<unsigned*>(take(2));
  w.z = take(layer.router_rank());
  w.zq = take(layer.bypass_rank());
  w.scores = take(layer.n_experts());
  w.h = take(layer.n_shared() + layer.n_active);
  w.partial = take(n_partials(layer) * layer.d_model());
  w.bytes = used;
  return w;
}

void route(const SecretMoeView& layer, const Workspace& w, const Product* with_bypass,
           std::int32_t* ids, StreamHandle stream) {
  const Product scores{layer.router_u,
                       {w.z, 1, layer.router_rank()},
                       layer.router_bias.data(),
                       {w.scores, 1, layer.n_experts()}};
  RowProducts products{};
  products.of[products.n++] = row_product(scores, 0);
  products.rows = layer.n_experts();
  if (with_bypass != nullptr) {
    products.of[products.n++] = row_product(*with_bypass, products.rows);
    products.rows += with_bypass->w.rows;
  }
  visit_format(layer.router_u.dtype, [&]<class Format>() {
    route_kernel<Format>
        <<<static_cast<unsigned>(ceil_div(products.rows, kRouteWarps)), kRouteWarps * kWarp,
           kRouteWarps * RowStream<Format>::kSharedBytes, stream>>>(
            products, w.scores, layer.n_experts(), layer.n_active, ids, &w.done[0]);
    check_launch("secret_moe route");
  });
}

// Activations of `neurons` into h, and their down rows into parts from `first` on; y only in the
// last launch. Returns the next part.
std::int64_t run_neurons(const SecretMoeView& layer, const Neurons& neurons, const WeightView& w,
                         const float* x, Scatter to, StreamHandle stream) {
  to.neurons_per_group = neurons_per_group(w, neurons.n);
  const std::int64_t groups = n_groups(w, neurons.n);
  visit_format(w.dtype, [&]<class Format>() {
    neurons_kernel<Format>
        <<<static_cast<unsigned>(ceil_div(neurons.n, kNeuronWarps)), kNeuronWarps * kWarp, 0,
           stream>>>(neurons, layer.phi, x, w.cols, to.h);
    check_launch("secret_moe neurons");
    const dim3 grid(static_cast<unsigned>(ceil_div(w.cols, kGroup)), static_cast<unsigned>(groups));
    scatter_kernel<Format><<<grid, kScatterWarps * kWarp, 0, stream>>>(neurons, to);
    check_launch("secret_moe scatter");
  });
  return to.first_partial + groups;
}

}  // namespace

std::size_t secret_moe_token_workspace(const SecretMoeView& layer) {
  return divide(layer, nullptr).bytes;
}

void secret_moe_token(const SecretMoeView& layer, ConstMatrix x, Matrix y, std::int32_t* selected,
                      std::byte* workspace, StreamHandle stream) {
  kernels::check_shapes(layer);
  const std::int64_t d_model = layer.d_model(), k = layer.n_active;
  require<ShapeError>(x.rows == 1 && x.cols == d_model && y.rows == 1 && y.cols == d_model,
                      "secret MoE: x is [{}, {}], y is [{}, {}], expected both [1, {}]", x.rows,
                      x.cols, y.rows, y.cols, d_model);
  require<ShapeError>(d_model % 4 == 0, "secret MoE: d_model is {}, expected a multiple of 4",
                      d_model);
  require_aligned_rows("secret MoE", x);
  for (const WeightView* w : {&layer.shared, &layer.experts}) require_weights("secret MoE", *w);
  const Workspace w = divide(layer, workspace);

  const bool bypassed = !layer.bypass_p.empty(), routed = k > 0;
  Product inwards[2];
  std::size_t n = 0;
  if (routed) inwards[n++] = {layer.router_v, x, nullptr, {w.z, 1, layer.router_rank()}};
  if (bypassed) inwards[n++] = {layer.bypass_q, x, nullptr, {w.zq, 1, layer.bypass_rank()}};
  linear({inwards, n}, stream);
  const Product outwards{layer.bypass_p, {w.zq, 1, layer.bypass_rank()}, layer.bias.data(), y};
  const bool together = bypassed && routed && layer.bypass_p.dtype == layer.router_u.dtype;
  if (bypassed && !together) linear(outwards, stream);
  if (routed) route(layer, w, together ? &outwards : nullptr, selected, stream);

  const float* base = bypassed ? y.data : layer.bias.data();
  const std::int64_t n_neurons = layer.n_shared() + k;
  if (n_neurons == 0) {
    if (!bypassed) {
      check(cudaMemcpyAsync(y.data, base, static_cast<std::size_t>(d_model) * sizeof(float),
                            cudaMemcpyDeviceToDevice, stream),
            "secret_moe bias");
    }
    return;
  }
  const Neurons all{
      bytes_of(layer.shared),  bytes_of(layer.experts), layer.n_shared(), n_neurons, selected,
      layer.expert_mean.data()};
  const Scatter to{w.h, d_model, 0, w.partial, 0, n_partials(layer), base, y.data, &w.done[1]};
  if (one_launch(layer)) {
    run_neurons(layer, all, any_neurons(layer), x.data, to, stream);
    return;
  }
  Neurons shared = all, experts = all;
  shared.n = layer.n_shared();
  experts.n_shared = 0;
  experts.n = k;
  Scatter first = to, second = to;
  first.y = nullptr;
  second.h += layer.n_shared();
  second.first_partial = run_neurons(layer, shared, layer.shared, x.data, first, stream);
  run_neurons(layer, experts, layer.experts, x.data, second, stream);
}

}  // namespace moesaic::cuda
