#include <algorithm>
#include <array>

#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/column_panels.cuh"
#include "kernels/cuda/base/last_block.cuh"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/base/row_times.cuh"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/self_routed.cuh"

namespace moesaic::cuda {
namespace {

using kernels::Activation;
using kernels::SelfRoutedView;

constexpr std::int64_t kMaxTokens = 8;  // of one launch
constexpr int kDownWarps = 8;
constexpr int kElementThreads = 256;

// Rows of float32 weights would stage more than a block may have.
template <class Row>
constexpr int kGateWarps = Row::kElems == 1 && Row::kBytes == 4 ? 4 : 8;

struct GateUp {
  const std::uint8_t* gate;        // column panels
  const std::uint8_t* up_columns;  // the same, or null: by rows
  WeightBytes up_rows;
  std::int64_t d_model, d_ff;
  Activation phi;
  Thresholds thresholds;
  const float* x;
  std::int64_t x_stride;
  float* h;  // [n_tokens, d_ff]
};

// h of 64 neurons of a token by one block: gate sums, φ, up sums of what is routed. By rows the
// routed neurons are listed, and a warp takes every kWarps-th of them.
template <class Format, bool kUpByRows>
__global__ void __launch_bounds__(kGateWarps<typename Format::Row>* kWarp,
                                  min_blocks(kGateWarps<typename Format::Row>))
    gate_up_kernel(const __grid_constant__ GateUp to) {
  using Row = typename Format::Row;
  constexpr int kWarps = kGateWarps<Row>;
  __shared__ PanelShared<kWarps> shared;
  __shared__ float gate[kColumnRows], up[kColumnRows];
  __shared__ int list[kColumnRows];
  __shared__ unsigned marks[kColumnRows / kWarp];
  const std::int64_t n_units = (to.d_model + kColumnUnit - 1) / kColumnUnit;
  const std::int64_t panel = blockIdx.x, panel_at = panel * n_units * Format::kUnitBytes;
  const float* x = to.x + blockIdx.y * to.x_stride;
  const auto large = [&](std::int64_t c) { return large_or_zero(x[c], to.thresholds.input[c]); };
  panel_sums<Format, kWarps>(to.gate + panel_at, 0, n_units, to.d_model, large, shared, gate);

  const int r = threadIdx.x;
  const std::int64_t neuron = panel * kColumnRows + r;
  const bool mine = r < kColumnRows && neuron < to.d_ff;
  const float a = mine ? phi_of(to.phi, gate[r]) : 0.0f;
  if constexpr (kUpByRows) {
    extern __shared__ __align__(16) std::uint8_t staged[];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const bool routed = mine && is_routed(a, to.thresholds.gate[neuron]);
    const unsigned mask = __ballot_sync(kAllLanes, routed);
    if (r < kColumnRows) {
      up[r] = 0;
      if (lane == 0) marks[warp] = mask;
    }
    __syncthreads();
    if (routed) {
      list[(warp == 0 ? 0 : __popc(marks[0])) + __popc(mask & ((1u << lane) - 1))] = r;
    }
    __syncthreads();
    const int n_routed = __popc(marks[0]) + __popc(marks[1]);
    for (int k = warp; k < n_routed; k += kWarps) {
      const int row = list[k];
      const float u = row_times<Row>(to.up_rows, panel * kColumnRows + row, x, to.d_model,
                                     staged + warp * RowStream<Row>::kSharedBytes, lane);
      if (lane == 0) up[row] = u;
    }
    __syncthreads();
    if (mine) {
      to.h[blockIdx.y * to.d_ff + neuron] =
          routed ? kept_or_zero(a, up[r], to.thresholds.hidden[neuron]) : 0.0f;
    }
  } else {
    panel_sums<Format, kWarps>(to.up_columns + panel_at, 0, n_units, to.d_model, large, shared, up);
    if (mine) {
      to.h[blockIdx.y * to.d_ff + neuron] = kept_or_zero(a, up[r], to.thresholds.hidden[neuron]);
    }
  }
}

struct Down {
  const std::uint8_t* down;  // column panels
  std::int64_t d_model, d_ff;
  std::int64_t units_per_group;
  const float* h;  // [n_tokens, d_ff]
  float* partial;  // [n_tokens, groups, d_model]
  unsigned* done;  // [n_tokens, panels]
  float* y;
  std::int64_t y_stride;
};

// Block (p, g, t) sums 64 dims of token t over the kept neurons of group g; the block of a panel
// that finishes last adds the groups up in order.
template <class Format>
__global__ void __launch_bounds__(kDownWarps* kWarp, min_blocks(kDownWarps))
    down_kernel(const __grid_constant__ Down to) {
  __shared__ PanelShared<kDownWarps> shared;
  __shared__ float sums[kColumnRows];
  const std::int64_t n_units = (to.d_ff + kColumnUnit - 1) / kColumnUnit;
  const std::int64_t panel = blockIdx.x, token = blockIdx.z;
  const std::int64_t first = blockIdx.y * to.units_per_group;
  const std::int64_t last = min(first + to.units_per_group, n_units);
  const float* h = to.h + token * to.d_ff;
  panel_sums<Format, kDownWarps>(
      to.down + panel * n_units * Format::kUnitBytes, first, last, to.d_ff,
      [&](std::int64_t c) { return h[c]; }, shared, sums);
  const std::int64_t dim = panel * kColumnRows + threadIdx.x;
  const bool mine = threadIdx.x < kColumnRows && dim < to.d_model;
  float* parts = to.partial + token * gridDim.y * to.d_model + dim;
  if (mine) parts[blockIdx.y * to.d_model] = sums[threadIdx.x];
  if (!last_block(&to.done[token * gridDim.x + panel], gridDim.y) || !mine) return;
  float total = 0;
  for (unsigned g = 0; g < gridDim.y; ++g) total += __ldcg(&parts[g * to.d_model]);
  to.y[token * to.y_stride + dim] = total;
}

// Without columns: the large entries of x, [n_tokens, d_model].
__global__ void __launch_bounds__(kElementThreads)
    large_kernel(ConstMatrix x, const float* threshold, float* to) {
  const std::int64_t c = std::int64_t{blockIdx.x} * kElementThreads + threadIdx.x;
  if (c < x.cols) {
    to[blockIdx.y * x.cols + c] = large_or_zero(x.data[blockIdx.y * x.stride + c], threshold[c]);
  }
}

// Without columns: h from all gate and up sums, [n_tokens, d_ff]; h may be gate.
__global__ void __launch_bounds__(kElementThreads)
    keep_kernel(const float* gate, const float* up, std::int64_t d_ff, Activation phi,
                Thresholds thresholds, float* h) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kElementThreads + threadIdx.x;
  if (i >= d_ff) return;
  const std::int64_t at = blockIdx.y * d_ff + i;
  const float a = phi_of(phi, gate[at]);
  const bool routed = thresholds.gate == nullptr || is_routed(a, thresholds.gate[i]);
  h[at] = routed ? kept_or_zero(a, up[at], thresholds.hidden[i]) : 0.0f;
}

const std::uint8_t* bytes(const std::byte* p) { return reinterpret_cast<const std::uint8_t*>(p); }

// Groups of the down columns. Each leaves a part of d_model floats, written and read again: as many
// as keep that within 1 % of the layer's weights.
std::int64_t units_per_group(const SelfRoutedView& layer) {
  const std::int64_t traffic = 2 * layer.d_model() * std::int64_t{sizeof(float)};
  const std::int64_t weights = layer.w_gate.bytes() + layer.w_up.bytes() + layer.w_down.bytes();
  const std::int64_t groups = std::max<std::int64_t>(1, weights / (100 * traffic));
  return std::max<std::int64_t>(kDownWarps, ceil_div(ceil_div(layer.d_ff(), kColumnUnit), groups));
}

std::int64_t n_groups(const SelfRoutedView& layer) {
  return ceil_div(ceil_div(layer.d_ff(), kColumnUnit), units_per_group(layer));
}

// The pieces of the workspace, each for kMaxTokens.
struct Workspace {
  unsigned* done;  // [panels of d_model], zero between calls
  float* partial;  // [groups, d_model]
  float* h;        // [d_ff]
  float* large;    // [d_model] and
  float* up;       // [d_ff], where the gate is not read by columns
  std::size_t bytes;
};

Workspace divide(const SelfRoutedView& layer, std::byte* data) {
  std::size_t used = 0;
  const auto take = [&](std::int64_t n) {
    std::byte* piece = data + used;
    used += (static_cast<std::size_t>(kMaxTokens * n) * sizeof(float) + 255) / 256 * 256;
    return reinterpret_cast<float*>(piece);
  };
  const bool by_columns = reads_gate_by_columns(layer), down = reads_down_by_columns(layer);
  Workspace w{};
  // First, and of a size that d_model alone gives: layers of one model share the workspace.
  w.done = reinterpret_cast<unsigned*>(take(ceil_div(layer.d_model(), kColumnRows)));
  w.partial = take(down ? n_groups(layer) * layer.d_model() : 0);
  w.h = take(layer.d_ff());
  w.large = take(by_columns ? 0 : layer.d_model());
  w.up = take(by_columns ? 0 : layer.d_ff());
  w.bytes = used;
  return w;
}

dim3 grid(std::int64_t x, std::int64_t y, std::int64_t z = 1) {
  return {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
}

void gate_up_by_columns(const SelfRoutedView& layer, ConstMatrix x, const Workspace& w,
                        StreamHandle stream) {
  const GateUp to{bytes(layer.gate_columns),
                  layer.up_by_input ? bytes(layer.up_parts) : nullptr,
                  {bytes(layer.w_up.data), layer.w_up.bytes()},
                  layer.d_model(),
                  layer.d_ff(),
                  layer.phi,
                  thresholds_of(layer),
                  x.data,
                  x.stride,
                  w.h};
  visit_column_format(layer.w_gate.dtype, [&]<class Format>() {
    using Row = typename Format::Row;
    constexpr int kWarps = kGateWarps<Row>;
    const dim3 blocks = grid(ceil_div(layer.d_ff(), kColumnRows), x.rows);
    if (layer.up_by_input) {
      gate_up_kernel<Format, false><<<blocks, kWarps * kWarp, 0, stream>>>(to);
    } else {
      gate_up_kernel<Format, true>
          <<<blocks, kWarps * kWarp, kWarps * RowStream<Row>::kSharedBytes, stream>>>(to);
    }
    check_launch("self_routed gate");
  });
}

void gate_up_by_rows(const SelfRoutedView& layer, ConstMatrix x, const Workspace& w,
                     StreamHandle stream) {
  const std::int64_t n = x.rows, d_model = layer.d_model(), d_ff = layer.d_ff();
  const Matrix large(w.large, n, d_model), gate(w.h, n, d_ff), up(w.up, n, d_ff);
  large_kernel<<<grid(ceil_div(d_model, kElementThreads), n), kElementThreads, 0, stream>>>(
      x, layer.input_threshold.data(), large.data);
  check_launch("self_routed input");
  const std::array<Product, 2> products = {
      Product{layer.w_gate, large, nullptr, gate},
      Product{layer.w_up, layer.up_by_input ? ConstMatrix(large) : x, nullptr, up}};
  linear(products, stream);
  keep_kernel<<<grid(ceil_div(d_ff, kElementThreads), n), kElementThreads, 0, stream>>>(
      gate.data, up.data, d_ff, layer.phi, thresholds_of(layer), w.h);
  check_launch("self_routed neurons");
}

void down_by_columns(const SelfRoutedView& layer, const Workspace& w, Matrix y,
                     StreamHandle stream) {
  const Down to{bytes(layer.down_columns),
                layer.d_model(),
                layer.d_ff(),
                units_per_group(layer),
                w.h,
                w.partial,
                w.done,
                y.data,
                y.stride};
  visit_column_format(layer.w_down.dtype, [&]<class Format>() {
    down_kernel<Format><<<grid(ceil_div(layer.d_model(), kColumnRows), n_groups(layer), y.rows),
                          kDownWarps * kWarp, 0, stream>>>(to);
    check_launch("self_routed down");
  });
}

}  // namespace

bool reads_gate_by_columns(const SelfRoutedView& layer) {
  return layer.w_gate.dtype == layer.w_up.dtype && has_column_panels(layer.w_gate.dtype);
}

bool reads_up_by_columns(const SelfRoutedView& layer) {
  return layer.up_by_input && reads_gate_by_columns(layer);
}

bool reads_down_by_columns(const SelfRoutedView& layer) {
  return has_column_panels(layer.w_down.dtype);
}

std::size_t self_routed_workspace(const SelfRoutedView& layer) {
  return divide(layer, nullptr).bytes;
}

void self_routed(const SelfRoutedView& layer, ConstMatrix x, Matrix y, std::byte* workspace,
                 StreamHandle stream) {
  check_operands(layer, x, y);
  if (!reads_up_by_columns(layer)) require_weights("self-routed layer", layer.w_up);
  const Workspace w = divide(layer, workspace);
  for (std::int64_t first = 0; first < x.rows; first += kMaxTokens) {
    const std::int64_t n = std::min(kMaxTokens, x.rows - first);
    const ConstMatrix some = x.slice(first, n);
    if (reads_gate_by_columns(layer)) {
      gate_up_by_columns(layer, some, w, stream);
    } else {
      gate_up_by_rows(layer, some, w, stream);
    }
    if (reads_down_by_columns(layer)) {
      down_by_columns(layer, w, y.slice(first, n), stream);
    } else {
      linear({layer.w_down, {w.h, n, layer.d_ff()}, nullptr, y.slice(first, n)}, stream);
    }
  }
}

}  // namespace moesaic::cuda
