#include <algorithm>

#include "kernels/cuda/activate.cuh"
#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/cooperative.cuh"
#include "kernels/cuda/base/last_block.cuh"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/base/row_slice.cuh"
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/secret_moe.h"
#include "kernels/cuda/top_k.cuh"

namespace moesaic::cuda {
namespace {

using kernels::Activation;
using kernels::SecretMoeView;

constexpr int kRouteWarps = 4;
constexpr int kDownDepth = 4;               // rows on their way to a lane
constexpr std::int64_t kLeastNeurons = 64;  // of a group
constexpr std::int64_t kLeastColumns = 64;  // of a slice

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

// What becomes of them: y = base + Σ h_j w_down,j.
struct Outputs {
  Activation phi;
  const float* x;
  std::int64_t cols;
  float* h;  // [n]
  std::int64_t neurons_per_group, n_groups;
  float* partial;     // [n_groups, cols], if there are several
  const float* base;  // may be y
  float* y;
  unsigned* arrived;
  unsigned* done;  // [slices of a row]
};

// φ(w_gate · x)(w_up · x) of a neuron, whose gate and up rows are one run, by a warp.
template <class Format>
__device__ float activation_of(const WeightBytes& weights, std::int64_t index, const Outputs& to,
                               std::uint8_t* staged, int lane) {
  const std::int64_t cols = to.cols, row_bytes = cols / Format::kElems * Format::kBytes;
  float gate = 0, up = 0;
  RowStream<Format>::run(weights, 3 * index * row_bytes, 2 * cols, staged, lane,
                         [&](std::int64_t c, std::int64_t left, const float(&w)[8]) {
                           for (int v = 0; v < Format::kVectors; ++v) {
                             const int at = Format::column(lane, v);
                             const bool is_up = c + at >= cols;
                             float xs[Format::kWidth], dot = 0;
                             load_floats<Format::kWidth>(to.x + c + at - (is_up ? cols : 0),
                                                         left - at, xs);
                             for (int i = 0; i < Format::kWidth; ++i) {
                               dot = fmaf(w[Format::kWidth * v + i], xs[i], dot);
                             }
                             (is_up ? up : gate) += dot;
                           }
                         });
  gate = warp_sum(gate);
  up = warp_sum(up);
  return phi_of(to.phi, gate) * up;
}

// Rows of float32 weights would stage more than a block may have.
template <class Format>
constexpr int kNeuronWarps = Format::kElems == 1 && Format::kBytes == 4 ? 4 : 8;

// Lanes that share a slice of a down row: few, so that slices are narrow and many; the whole warp
// where a block has that many columns.
template <class Format>
constexpr int kDownLanes = Format::kElems == 256 ? kWarp : 8;

// What a lane has of Σ h_j w_down,j over neurons [begin, end) and a slice of `count` columns: a
// warp takes kRows rows at once, kDownDepth deep, every kNeuronWarps-th of such runs.
template <class Format>
struct DownSlice {
  static constexpr int kLanes = kDownLanes<Format>;
  using Slice = RowSlice<Format, kLanes>;
  static constexpr int kRows = kWarp / kLanes;
  static constexpr int kBuffer = staged_bytes(Slice::kMaxBytes);
  // Of a warp, which has used it for gate and up before.
  static constexpr int kSharedBytes =
      std::max(RowStream<Format>::kSharedBytes, kRows* kDownDepth* kBuffer);

  __device__ static void add(const Neurons& neurons, const Outputs& to, std::int64_t begin,
                             std::int64_t end, std::int64_t slice, int count, std::uint8_t* staged,
                             float (&sum)[8]) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int r = lane / kLanes, l = lane % kLanes;
    const std::int64_t row_bytes = to.cols / Format::kElems * Format::kBytes;
    constexpr int kRun = kRows * kDownDepth;
    for (std::int64_t first = begin + warp * kRun; first < end;
         first += kNeuronWarps<Format> * kRun) {
      const std::uint8_t* at[kDownDepth];
#pragma unroll
      for (int d = 0; d < kDownDepth; ++d) {
        const std::int64_t j = first + d * kRows + r;
        at[d] = staged;
        if (j >= end) continue;
        const std::int64_t from = (3 * neurons.index(j) + 2) * row_bytes;
        at[d] = stage<kLanes>(neurons.weights(j), from + Slice::first_byte(slice),
                              from + Slice::end_byte(slice, count),
                              staged + (d * kRows + r) * kBuffer, l);
      }
      __pipeline_commit();
      __pipeline_wait_prior(0);
      __syncwarp();
#pragma unroll
      for (int d = 0; d < kDownDepth; ++d) {
        const std::int64_t j = first + d * kRows + r;
        if (j >= end) continue;
        float w[8];
        Slice::unpack(at[d], slice, l, count, w);
        const float h = __ldcg(&to.h[j]);
        for (int i = 0; i < 8; ++i) sum[i] = fmaf(h, w[i], sum[i]);
      }
      __syncwarp();  // before the buffers are written again
    }
#pragma unroll
    for (int offset = kLanes; offset < kWarp; offset *= 2) {
      for (int i = 0; i < 8; ++i) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], offset);
    }
  }
};

// h_j = φ(w_gate · x)(w_up · x) − μ by a warp per neuron, then, all blocks having met, the down
// rows by a block per slice of columns and group of neurons. No atomic additions: groups, where
// there are several, leave a part each, which the last block of a slice adds up in order.
template <class Format>
__global__ void __launch_bounds__(kNeuronWarps<Format>* kWarp, min_blocks(kNeuronWarps<Format>))
    neurons_kernel(const __grid_constant__ Neurons neurons, const __grid_constant__ Outputs to) {
  using Down = DownSlice<Format>;
  using Slice = typename Down::Slice;
  constexpr int kWarps = kNeuronWarps<Format>;
  __shared__ __align__(16) std::uint8_t all_staged[kWarps * Down::kSharedBytes];
  __shared__ float sums[kWarps][Slice::kColumns];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  std::uint8_t* staged = all_staged + warp * Down::kSharedBytes;
  for (std::int64_t j = std::int64_t{blockIdx.x} * kWarps + warp; j < neurons.n;
       j += std::int64_t{gridDim.x} * kWarps) {
    const std::int64_t index = neurons.index(j);
    const float f = activation_of<Format>(neurons.weights(j), index, to, staged, lane);
    if (lane == 0) to.h[j] = f - (neurons.is_shared(j) ? 0.0f : neurons.mean[index]);
  }
  grid_barrier(to.arrived);

  const std::int64_t n_slices = (to.cols + Slice::kColumns - 1) / Slice::kColumns;
  for (std::int64_t item = blockIdx.x; item < n_slices * to.n_groups; item += gridDim.x) {
    const std::int64_t slice = item % n_slices, group = item / n_slices;
    const std::int64_t first = slice * Slice::kColumns, c = first + threadIdx.x;
    const int count =
        static_cast<int>(min(to.cols - first, static_cast<std::int64_t>(Slice::kColumns)));
    const std::int64_t begin = group * to.neurons_per_group;
    const std::int64_t end = min(begin + to.neurons_per_group, neurons.n);
    float sum[8] = {};
    Down::add(neurons, to, begin, end, first, count, staged, sum);
    if (lane < Down::kLanes) {
      for (int i = 0; i < 8; ++i) {
        sums[warp][Slice::column(lane, i / Format::kWidth) + i % Format::kWidth] = sum[i];
      }
    }
    __syncthreads();
    const bool mine = static_cast<int>(threadIdx.x) < count;
    float total = 0;
    if (mine) {
      for (int w = 0; w < kWarps; ++w) total += sums[w][threadIdx.x];
    }
    if (to.n_groups > 1) {
      if (mine) to.partial[group * to.cols + c] = total;
      if (!last_block(&to.done[slice], static_cast<unsigned>(to.n_groups))) continue;
      total = 0;
      for (std::int64_t g = 0; mine && g < to.n_groups; ++g) {
        total += __ldcg(&to.partial[g * to.cols + c]);
      }
    }
    if (mine) to.y[c] = to.base[c] + total;
    __syncthreads();  // before the sums are written again
  }
}

WeightBytes bytes_of(const WeightView& w) {
  return {reinterpret_cast<const std::uint8_t*>(w.data), w.bytes()};
}

// Groups of the neurons of a launch of n. Each leaves a part of d_model floats, written and read
// again: as many as keep that within 1 % of the neurons' weights.
std::int64_t neurons_per_group(const WeightView& w, std::int64_t n) {
  const std::int64_t traffic = 2 * w.cols * std::int64_t{sizeof(float)};
  const std::int64_t groups = std::max<std::int64_t>(1, n * 3 * w.row_bytes() / (100 * traffic));
  return std::max(kLeastNeurons, ceil_div(n, groups));
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

// Of the launch that has most.
std::int64_t n_partials(const SecretMoeView& layer) {
  const std::int64_t n = layer.n_shared() + layer.n_active;
  if (one_launch(layer)) return n_groups(any_neurons(layer), n);
  return std::max(n_groups(layer.shared, layer.n_shared()),
                  n_groups(layer.experts, layer.n_active));
}

// The pieces of the workspace.
struct Workspace {
  unsigned* done;  // [2 + slices of d_model]: top-k, grid barrier, slices
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
  // First, and of a size that d_model alone gives: layers of one model share the workspace.
  w.done = reinterpret_cast<unsigned*>(take(2 + ceil_div(layer.d_model(), kLeastColumns)));
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

// y = base + what `neurons` give.
void run_neurons(const Neurons& neurons, const WeightView& w, Outputs to, StreamHandle stream) {
  to.neurons_per_group = neurons_per_group(w, neurons.n);
  to.n_groups = n_groups(w, neurons.n);
  visit_format(w.dtype, [&]<class Format>() {
    constexpr int kWarps = kNeuronWarps<Format>;
    const std::int64_t slices = ceil_div(w.cols, 8 * kDownLanes<Format>);
    launch_cooperative("secret_moe neurons", neurons_kernel<Format>,
                       std::max(ceil_div(neurons.n, kWarps), slices * to.n_groups), kWarps * kWarp,
                       stream, neurons, to);
  });
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
  const Outputs to{layer.phi, x.data, d_model, w.h,        0,         0,
                   w.partial, base,   y.data,  &w.done[1], &w.done[2]};
  if (one_launch(layer)) {
    run_neurons(all, any_neurons(layer), to, stream);
    return;
  }
  Neurons shared = all, experts = all;
  shared.n = layer.n_shared();
  experts.n_shared = 0;
  experts.n = k;
  run_neurons(shared, layer.shared, to, stream);
  Outputs more = to;
  more.base = y.data;
  run_neurons(experts, layer.experts, more, stream);
}

}  // namespace moesaic::cuda
