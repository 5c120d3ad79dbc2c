#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/base/warp.cuh"
#include "kernels/cuda/training/gated_mlp.h"
#include "kernels/cuda/training/slopes.cuh"

namespace moesaic::cuda {
namespace {

constexpr int kThreads = 256;

__device__ float threshold_at(const Threshold& t, std::int64_t i) { return t.given[i] * t.factor; }

// Adds the block's number of true ones.
__device__ void count(bool kept, Count* to) {
  const int n = __syncthreads_count(kept);
  if (threadIdx.x == 0 && n > 0) atomicAdd(to, static_cast<Count>(n));
}

// Elements of a matrix without gaps, one a thread.
__global__ void __launch_bounds__(kThreads)
    keep_large_kernel(const float* x, std::int64_t n, std::int64_t d, Threshold threshold,
                      std::uint16_t* all, std::uint16_t* large, std::uint8_t* mask,
                      Count* counted) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  bool keep = false;
  if (i < n) {
    const float v = x[i];
    keep = fabsf(v) >= threshold_at(threshold, i % d);
    store(v, all + i);
    store(keep ? v : 0.0f, large + i);
    mask[i] = keep;
  }
  count(keep, counted);
}

__global__ void __launch_bounds__(kThreads)
    keep_neurons_kernel(kernels::Activation phi, const float* gate, const float* up, std::int64_t n,
                        std::int64_t d_ff, Threshold gate_threshold, Threshold hidden_threshold,
                        std::uint16_t* h, std::uint16_t* slope_gate, std::uint16_t* slope_up,
                        Count* counts) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  bool route = false, keep = false;
  if (i < n) {
    float a, slope;
    value_and_slope(phi, gate[i], &a, &slope);
    const float u = up[i], product = a * u;
    route = gate_threshold.given == nullptr || fabsf(a) >= threshold_at(gate_threshold, i % d_ff);
    keep = route && (hidden_threshold.given == nullptr ||
                     fabsf(product) >= threshold_at(hidden_threshold, i % d_ff));
    store(keep ? product : 0.0f, h + i);
    store(keep ? slope * u : 0.0f, slope_gate + i);
    store(keep ? a : 0.0f, slope_up + i);
  }
  if (counts == nullptr) return;
  count(route, counts);
  count(keep, counts + 1);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_slopes_kernel(const float* dh, std::int64_t n, T* slope_gate, T* slope_up) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= n) return;
  store(value_of(slope_gate[i]) * dh[i], slope_gate + i);
  store(value_of(slope_up[i]) * dh[i], slope_up + i);
}

__global__ void __launch_bounds__(kThreads)
    mask_gradient_kernel(const std::uint8_t* mask, std::int64_t n, float* dx) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < n && mask[i] == 0) dx[i] = 0;
}

unsigned blocks(std::int64_t n) { return static_cast<unsigned>(ceil_div(n, kThreads)); }

template <class T>
void launch_scale_slopes(const float* dh, std::int64_t n, T* slope_gate, T* slope_up,
                         StreamHandle stream) {
  if (n == 0) return;
  scale_slopes_kernel<<<blocks(n), kThreads, 0, stream>>>(dh, n, slope_gate, slope_up);
  check_launch("scale_slopes");
}

void require_no_gaps(const char* op, ConstMatrix m) {
  require<ShapeError>(m.rows <= 1 || m.stride == m.cols,
                      "{}: [{}, {}] in rows of {}, expected no gaps", op, m.rows, m.cols, m.stride);
}

}  // namespace

void keep_large(ConstMatrix x, const Threshold& threshold, std::uint16_t* all, std::uint16_t* large,
                std::uint8_t* mask, Count* count, StreamHandle stream) {
  require_no_gaps("keep_large", x);
  const std::int64_t n = x.rows * x.cols;
  if (n == 0) return;
  keep_large_kernel<<<blocks(n), kThreads, 0, stream>>>(x.data, n, x.cols, threshold, all, large,
                                                        mask, count);
  check_launch("keep_large");
}

void keep_neurons(kernels::Activation phi, ConstMatrix gate, ConstMatrix up,
                  const Threshold& gate_threshold, const Threshold& hidden_threshold,
                  std::uint16_t* h, std::uint16_t* slope_gate, std::uint16_t* slope_up,
                  Count* counts, StreamHandle stream) {
  require<ShapeError>(gate.rows == up.rows && gate.cols == up.cols,
                      "keep_neurons: gate is [{}, {}], up [{}, {}], expected the same shape",
                      gate.rows, gate.cols, up.rows, up.cols);
  require_no_gaps("keep_neurons", gate);
  require_no_gaps("keep_neurons", up);
  const std::int64_t n = gate.rows * gate.cols;
  if (n == 0) return;
  keep_neurons_kernel<<<blocks(n), kThreads, 0, stream>>>(phi, gate.data, up.data, n, gate.cols,
                                                          gate_threshold, hidden_threshold, h,
                                                          slope_gate, slope_up, counts);
  check_launch("keep_neurons");
}

void scale_slopes(const float* dh, std::int64_t n, std::uint16_t* slope_gate,
                  std::uint16_t* slope_up, StreamHandle stream) {
  launch_scale_slopes(dh, n, slope_gate, slope_up, stream);
}

void scale_slopes(const float* dh, std::int64_t n, float* slope_gate, float* slope_up,
                  StreamHandle stream) {
  launch_scale_slopes(dh, n, slope_gate, slope_up, stream);
}

void mask_gradient(const std::uint8_t* mask, std::int64_t n, float* dx, StreamHandle stream) {
  if (n == 0) return;
  mask_gradient_kernel<<<blocks(n), kThreads, 0, stream>>>(mask, n, dx);
  check_launch("mask_gradient");
}

}  // namespace moesaic::cuda
