#include <algorithm>

#include "kernels/cuda/activate.cuh"
#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/base/row_times.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/mixture.h"
#include "kernels/cuda/top_k.h"

namespace moesaic::cuda {
namespace {

using kernels::Activation;
using kernels::ExpertKind;
using kernels::GateKind;
using kernels::MixtureView;
using kernels::RouterKind;

constexpr std::int64_t kMaxTokens = 8;  // of one launch
constexpr int kNeuronWarps = 4;
constexpr int kOutWarps = kGroup / kWarp;  // a thread per column of a slice
constexpr int kDepth = 4;                  // rows on their way to a warp
constexpr int kElementThreads = 256;

// What a token runs of one matrix: all of its neurons, or those of the experts that ids names.
struct Neurons {
  ExpertKind kind;
  Activation phi;
  WeightBytes weights;
  std::int64_t rows_per_neuron, block;
  std::int64_t n;           // of a token, a multiple of block
  const std::int32_t* ids;  // [n_tokens, n / block], or null
  const float* gates;       // the same; null: 1
  const float* bias;        // by neuron of the matrix; null: 0
  const float* mean;        // the same

  __device__ std::int64_t place(std::int64_t token, std::int64_t j) const {
    return token * (n / block) + j / block;
  }
  __device__ std::int64_t expert(std::int64_t token, std::int64_t j) const {
    return ids != nullptr ? ids[place(token, j)] : j / block;
  }
  // Its first row; the others follow `block` apart.
  __device__ std::int64_t row(std::int64_t token, std::int64_t j) const {
    return expert(token, j) * rows_per_neuron * block + j % block;
  }
};

// The scores of pairs of keys.   keys [2 n_tokens, 2 m]: of a token's two halves, each against all
// keys. scores [n_tokens, m²].
__global__ void __launch_bounds__(kElementThreads)
    pair_kernel(const float* keys, std::int64_t m, float* scores) {
  const std::int64_t e = std::int64_t{blockIdx.x} * kElementThreads + threadIdx.x;
  if (e >= m * m) return;
  const float* both = keys + blockIdx.y * 4 * m;
  scores[blockIdx.y * m * m + e] = both[e / m] + both[2 * m + m + e % m];
}

// gates [n_tokens, k]: the scores [n_tokens, n_experts] of the selected experts.
__global__ void __launch_bounds__(kElementThreads)
    gate_kernel(const float* scores, std::int64_t n_experts, const std::int32_t* ids,
                std::int64_t k, float* gates) {
  const std::int64_t j = std::int64_t{blockIdx.x} * kElementThreads + threadIdx.x;
  if (j >= k) return;
  const std::int64_t at = blockIdx.y * k + j;
  gates[at] = scores[blockIdx.y * n_experts + ids[at]];
}

// h [n_tokens, n] = g (f(x) − μ): a warp per neuron and token.
template <class Format>
__global__ void __launch_bounds__(kNeuronWarps* kWarp, min_blocks(kNeuronWarps))
    activations_kernel(const __grid_constant__ Neurons neurons, ConstMatrix x, float* h) {
  __shared__ __align__(16) std::uint8_t all_staged[kNeuronWarps * RowStream<Format>::kSharedBytes];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  std::uint8_t* staged = all_staged + warp * RowStream<Format>::kSharedBytes;
  const std::int64_t j = std::int64_t{blockIdx.x} * kNeuronWarps + warp, token = blockIdx.y;
  if (j >= neurons.n) return;
  const std::int64_t row = neurons.row(token, j);
  const std::int64_t index = neurons.expert(token, j) * neurons.block + j % neurons.block;
  const float* x_t = x.data + token * x.stride;
  float f = row_times<Format>(neurons.weights, row, x_t, x.cols, staged, lane);
  if (neurons.bias != nullptr) f += neurons.bias[index];
  if (neurons.kind == ExpertKind::Glu) {
    const float up =
        row_times<Format>(neurons.weights, row + neurons.block, x_t, x.cols, staged, lane);
    f = phi_of(neurons.phi, f) * up;
  } else if (neurons.kind == ExpertKind::Gelu) {
    f = phi_of(Activation::GeluTanh, f);
  }
  if (lane != 0) return;
  if (neurons.mean != nullptr) f -= neurons.mean[index];
  if (neurons.gates != nullptr) f *= neurons.gates[neurons.place(token, j)];
  h[token * neurons.n + j] = f;
}

// y = base + Σ h_j w_out,j: a block per slice of a token's columns, each warp every kOutWarps-th
// neuron, then the warps in order.
template <class Format>
__global__ void __launch_bounds__(kOutWarps* kWarp, min_blocks(kOutWarps))
    outputs_kernel(const __grid_constant__ Neurons neurons, const float* h, const float* base,
                   std::int64_t base_stride, Matrix y) {
  constexpr int kBuffer = staged_bytes(kGroup / Format::kElems * Format::kBytes);
  __shared__ __align__(16) std::uint8_t staged[kOutWarps * kDepth * kBuffer];
  __shared__ float sums[kOutWarps][kGroup];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::int64_t slice = std::int64_t{blockIdx.x} * kGroup, token = blockIdx.y;
  const int count = static_cast<int>(min(y.cols - slice, static_cast<std::int64_t>(kGroup)));
  const std::int64_t row_bytes = y.cols / Format::kElems * Format::kBytes;
  const std::int64_t last_row = (neurons.rows_per_neuron - 1) * neurons.block;
  float sum[8] = {};
  for (std::int64_t first = warp; first < neurons.n; first += kOutWarps * kDepth) {
    const std::uint8_t* at[kDepth];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const std::int64_t j = first + d * kOutWarps;
      at[d] = staged;
      if (j >= neurons.n) continue;
      const std::int64_t from = (neurons.row(token, j) + last_row) * row_bytes;
      at[d] = stage(neurons.weights, from + slice / Format::kElems * Format::kBytes,
                    from + (slice + count) / Format::kElems * Format::kBytes,
                    staged + (warp * kDepth + d) * kBuffer, lane);
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncwarp();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const std::int64_t j = first + d * kOutWarps;
      if (j >= neurons.n) continue;
      float w[8];
      Format::unpack(at[d], lane, count, w);
      const float h_j = h[token * neurons.n + j];
      for (int i = 0; i < 8; ++i) sum[i] = fmaf(h_j, w[i], sum[i]);
    }
    __syncwarp();  // before the buffers are written again
  }
  for (int i = 0; i < 8; ++i) {
    sums[warp][Format::column(lane, i / Format::kWidth) + i % Format::kWidth] = sum[i];
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= count) return;
  const std::int64_t c = slice + threadIdx.x;
  float total = base[token * base_stride + c];
  for (int w = 0; w < kOutWarps; ++w) total += sums[w][threadIdx.x];
  y.data[token * y.stride + c] = total;
}

std::int64_t n_routed(const MixtureView& layer) { return layer.n_active * layer.block; }

dim3 grid(std::int64_t x, std::int64_t y) {
  return {static_cast<unsigned>(x), static_cast<unsigned>(y)};
}

// The pieces of the workspace, each for kMaxTokens.
struct Workspace {
  float* z;           // [rows of V]
  float* keys;        // [2, 2 m]
  float* scores;      // [n_experts]
  float* gates;       // [n_active]
  std::int32_t* ids;  // [n_active]
  float* zq;          // [bypass_rank]
  float* h;           // [n_shared or n_active · block, the larger]
  std::size_t bytes;
};

Workspace divide(const MixtureView& layer, std::byte* data) {
  std::size_t used = 0;
  const auto take = [&]<class T>(T*& piece, std::int64_t n) {
    piece = reinterpret_cast<T*>(data + used);
    used += (static_cast<std::size_t>(kMaxTokens * n) * sizeof(T) + 255) / 256 * 256;
  };
  Workspace w{};
  take(w.z, aligned_floats(layer.router_v.rows));
  take(w.keys, layer.kind.router == RouterKind::ProductKey ? 2 * layer.router_u.rows : 0);
  take(w.scores, layer.n_experts());
  take(w.gates, layer.n_active);
  take(w.ids, layer.n_active);
  take(w.zq, aligned_floats(layer.bypass_rank()));
  take(w.h, std::max(layer.n_shared(), n_routed(layer)));
  w.bytes = used;
  return w;
}

// Scores, selection and, where the layer has them, gates of a few tokens.
void route(const MixtureView& layer, ConstMatrix x, const Workspace& w, std::int32_t* ids,
           float* gates, StreamHandle stream) {
  const std::int64_t n = x.rows, k = layer.n_active, n_experts = layer.n_experts();
  const Matrix scores(w.scores, n, n_experts);
  const float* bias = layer.router_bias.data();
  if (layer.kind.router == RouterKind::FullRank) {
    linear({layer.router_u, x, bias, scores}, stream);
  } else {
    const Matrix z(w.z, n, layer.router_v.rows, aligned_floats(layer.router_v.rows));
    linear({layer.router_v, x, nullptr, z}, stream);
    if (layer.kind.router == RouterKind::LowRank) {
      linear({layer.router_u, z, bias, scores}, stream);
    } else {
      // Both halves of a token against all keys: half of the products are not used.
      const std::int64_t n_keys = layer.router_u.rows, m = n_keys / 2;
      linear({layer.router_u, {w.z, 2 * n, layer.router_rank()}, bias, {w.keys, 2 * n, n_keys}},
             stream);
      pair_kernel<<<grid(ceil_div(n_experts, kElementThreads), n), kElementThreads, 0, stream>>>(
          w.keys, m, w.scores);
      check_launch("mixture pairs");
    }
  }
  top_k(scores, k, ids, stream);
  if (layer.kind.gate == GateKind::None) return;
  gate_kernel<<<grid(ceil_div(k, kElementThreads), n), kElementThreads, 0, stream>>>(
      w.scores, n_experts, ids, k, gates);
  check_launch("mixture gates");
  const Matrix rows(gates, n, k);
  if (layer.kind.gate == GateKind::Softmax) softmax(rows, rows, stream);
}

// y = base + what the neurons give; base may be y.
void run_neurons(const Neurons& neurons, DType dtype, ConstMatrix x, float* h, const float* base,
                 std::int64_t base_stride, Matrix y, StreamHandle stream) {
  visit_format(dtype, [&]<class Format>() {
    if (neurons.n > 0) {
      activations_kernel<Format>
          <<<grid(ceil_div(neurons.n, kNeuronWarps), x.rows), kNeuronWarps * kWarp, 0, stream>>>(
              neurons, x, h);
      check_launch("mixture activations");
    }
    outputs_kernel<Format>
        <<<grid(ceil_div(y.cols, kGroup), x.rows), kOutWarps * kWarp, 0, stream>>>(neurons, h, base,
                                                                                   base_stride, y);
    check_launch("mixture outputs");
  });
}

const float* or_null(std::span<const float> values) {
  return values.empty() ? nullptr : values.data();
}

void run_tokens(const MixtureView& layer, ConstMatrix x, Matrix y, std::int32_t* ids, float* gates,
                const Workspace& w, StreamHandle stream) {
  if (ids == nullptr) ids = w.ids;
  if (gates == nullptr) gates = w.gates;
  const bool routed = n_routed(layer) > 0, bypassed = !layer.bypass_p.empty();
  if (routed) route(layer, x, w, ids, gates, stream);
  if (bypassed) {
    const Matrix zq(w.zq, x.rows, layer.bypass_rank(), aligned_floats(layer.bypass_rank()));
    linear({layer.bypass_q, x, nullptr, zq}, stream);
    linear({layer.bypass_p, zq, layer.bias.data(), y}, stream);
  }
  const auto bytes = [](const WeightView& m) {
    return WeightBytes{reinterpret_cast<const std::uint8_t*>(m.data), m.bytes()};
  };
  const std::int64_t rows = kernels::rows_per_neuron(layer.kind.expert);
  const Neurons shared{
      layer.kind.expert, layer.phi, bytes(layer.shared),        rows,   1, layer.n_shared(),
      nullptr,           nullptr,   or_null(layer.shared_bias), nullptr};
  // Also where there is none: it is what puts b into y.
  run_neurons(shared, layer.shared.dtype, x, w.h, bypassed ? y.data : layer.bias.data(),
              bypassed ? y.stride : 0, y, stream);
  if (!routed) return;
  const Neurons experts{layer.kind.expert,
                        layer.phi,
                        bytes(layer.experts),
                        rows,
                        layer.block,
                        n_routed(layer),
                        ids,
                        layer.kind.gate == GateKind::None ? nullptr : gates,
                        or_null(layer.expert_bias),
                        or_null(layer.expert_mean)};
  run_neurons(experts, layer.experts.dtype, x, w.h, y.data, y.stride, y, stream);
}

}  // namespace

std::size_t mixture_workspace(const MixtureView& layer) { return divide(layer, nullptr).bytes; }

void mixture(const MixtureView& layer, ConstMatrix x, Matrix y, std::int32_t* selected,
             float* gates, std::byte* workspace, StreamHandle stream) {
  kernels::check_shapes(layer);
  const std::int64_t d_model = layer.d_model(), k = layer.n_active;
  require<ShapeError>(x.cols == d_model && y.cols == d_model && y.rows == x.rows,
                      "mixture: x [{}, {}] and y [{}, {}], expected [n, {}]", x.rows, x.cols,
                      y.rows, y.cols, d_model);
  require<ShapeError>(d_model % 4 == 0, "mixture: d_model is {}, expected a multiple of 4",
                      d_model);
  require<ShapeError>(layer.kind.router != RouterKind::ProductKey || layer.router_rank() % 4 == 0,
                      "mixture: product keys of rank {}, expected a multiple of 4",
                      layer.router_rank());
  for (const ConstMatrix& m : {x, ConstMatrix(y)}) require_aligned_rows("mixture", m);
  for (const WeightView* w : {&layer.shared, &layer.experts}) require_weights("mixture", *w);
  const Workspace w = divide(layer, workspace);
  for (std::int64_t first = 0; first < x.rows; first += kMaxTokens) {
    const std::int64_t n = std::min(kMaxTokens, x.rows - first);
    run_tokens(layer, x.slice(first, n), y.slice(first, n),
               selected == nullptr ? nullptr : selected + first * k,
               gates == nullptr ? nullptr : gates + first * k, w, stream);
  }
}

}  // namespace moesaic::cuda
