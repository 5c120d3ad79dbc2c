#include <algorithm>

#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/row_stream.cuh"
#include "kernels/cuda/base/tensor_core.cuh"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/self_routed.cuh"

namespace moesaic::cuda {
namespace {

using kernels::Activation;
using kernels::SelfRoutedView;

constexpr int kThreads = 128;

__device__ void store_four(const float (&v)[4], __nv_bfloat16* to) {
  *reinterpret_cast<std::uint64_t*>(to) = bf16_four(v[0], v[1], v[2], v[3]);
}

// x̂, and x itself unless `all` is null, rounded. A thread takes four neighbouring columns of a
// token; columns are a multiple of four.
__global__ void __launch_bounds__(kThreads)
    round_inputs_kernel(ConstMatrix x, const float* threshold, __nv_bfloat16* large,
                        __nv_bfloat16* all, std::int64_t stride) {
  const std::int64_t c = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * 4, t = blockIdx.y;
  if (c >= x.cols) return;
  float v[4], least[4];
  load_floats<4>(x.data + t * x.stride + c, 4, v);
  load_floats<4>(threshold + c, 4, least);
  if (all != nullptr) store_four(v, all + t * stride + c);
  for (int i = 0; i < 4; ++i) v[i] = large_or_zero(v[i], least[i]);
  store_four(v, large + t * stride + c);
}

// h from gate and up sums, [n_tokens, d_ff] each, rounded. Threads as above.
__global__ void __launch_bounds__(kThreads)
    hidden_kernel(const float* gate, const float* up, std::int64_t d_ff, Activation phi,
                  Thresholds thresholds, __nv_bfloat16* h, std::int64_t stride) {
  const std::int64_t c = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * 4, t = blockIdx.y;
  if (c >= d_ff) return;
  float g[4], u[4], least[4], v[4], gate_least[4];
  load_floats<4>(gate + t * d_ff + c, 4, g);
  load_floats<4>(up + t * d_ff + c, 4, u);
  load_floats<4>(thresholds.hidden + c, 4, least);
  if (thresholds.gate != nullptr) load_floats<4>(thresholds.gate + c, 4, gate_least);
  for (int i = 0; i < 4; ++i) {
    const float a = phi_of(phi, g[i]);
    const bool routed = thresholds.gate == nullptr || is_routed(a, gate_least[i]);
    v[i] = routed ? kept_or_zero(a, u[i], least[i]) : 0.0f;
  }
  store_four(v, h + t * stride + c);
}

// The pieces of the workspace.
struct Workspace {
  __nv_bfloat16* large;  // [n_tokens, d_model], rows bf16_stride() apart
  __nv_bfloat16* all;    // the same; null with up_by_input
  float* gate;           // [n_tokens, d_ff]
  float* up;             // [n_tokens, d_ff]
  __nv_bfloat16* h;      // [n_tokens, d_ff], rows bf16_stride() apart
  std::span<std::byte> unpacked;
  std::size_t bytes;
};

Workspace divide(const SelfRoutedView& layer, std::int64_t n_tokens, std::byte* data) {
  std::size_t used = 0;
  const auto take = [&](std::size_t bytes) {
    std::byte* piece = data + used;
    used += (bytes + 255) / 256 * 256;
    return piece;
  };
  const auto rows_of = [&](std::int64_t cols, std::size_t element) {
    return take(static_cast<std::size_t>(n_tokens * cols) * element);
  };
  const std::int64_t d_model = layer.d_model(), d_ff = layer.d_ff();
  const std::int64_t model_stride = bf16_stride(d_model), ff_stride = bf16_stride(d_ff);
  Workspace w{};
  w.large = reinterpret_cast<__nv_bfloat16*>(rows_of(model_stride, sizeof(__nv_bfloat16)));
  if (!layer.up_by_input) {
    w.all = reinterpret_cast<__nv_bfloat16*>(rows_of(model_stride, sizeof(__nv_bfloat16)));
  }
  w.gate = reinterpret_cast<float*>(rows_of(d_ff, sizeof(float)));
  w.up = reinterpret_cast<float*>(rows_of(d_ff, sizeof(float)));
  w.h = reinterpret_cast<__nv_bfloat16*>(rows_of(ff_stride, sizeof(__nv_bfloat16)));
  const std::size_t unpacked = gemm_workspace(0, std::max(d_model, d_ff),
                                              std::max(d_ff * model_stride, d_model * ff_stride));
  w.unpacked = {take(unpacked), unpacked};
  w.bytes = used;
  return w;
}

Bf16Matrix rounded(const __nv_bfloat16* data, std::int64_t rows, std::int64_t cols) {
  return {reinterpret_cast<const std::uint16_t*>(data), rows, cols, bf16_stride(cols)};
}

dim3 grid(std::int64_t cols, std::int64_t n_tokens) {
  return {static_cast<unsigned>(ceil_div(cols, 4 * kThreads)), static_cast<unsigned>(n_tokens)};
}

}  // namespace

std::size_t self_routed_batch_workspace(const SelfRoutedView& layer, std::int64_t n_tokens) {
  return divide(layer, n_tokens, nullptr).bytes;
}

void self_routed_batch(Blas& blas, const SelfRoutedView& layer, ConstMatrix x, Matrix y,
                       std::byte* workspace, StreamHandle stream) {
  check_operands(layer, x, y);
  constexpr std::int64_t kMaxTokens = 65535;  // CUDA's limit of a grid's second side
  require<ShapeError>(x.rows <= kMaxTokens, "self-routed layer: {} tokens, expected at most {}",
                      x.rows, kMaxTokens);
  for (const auto t : {layer.input_threshold, layer.gate_threshold, layer.hidden_threshold}) {
    require_aligned_rows("self-routed layer: thresholds",
                         {t.data(), 1, static_cast<std::int64_t>(t.size())});
  }
  if (x.rows == 0) return;
  const std::int64_t n = x.rows, d_model = layer.d_model(), d_ff = layer.d_ff();
  const Workspace w = divide(layer, n, workspace);
  const Thresholds thresholds = thresholds_of(layer);
  round_inputs_kernel<<<grid(d_model, n), kThreads, 0, stream>>>(x, thresholds.input, w.large,
                                                                 w.all, bf16_stride(d_model));
  check_launch("self_routed_batch input");
  const Bf16Matrix large = rounded(w.large, n, d_model);
  const Bf16Matrix up_x = layer.up_by_input ? large : rounded(w.all, n, d_model);
  const Matrix gate(w.gate, n, d_ff), up(w.up, n, d_ff);
  gemm(blas,
       {layer.w_gate, reads_gate_by_columns(layer) ? layer.gate_columns : nullptr, large, gate},
       w.unpacked, stream);
  gemm(blas, {layer.w_up, reads_up_by_columns(layer) ? layer.up_parts : nullptr, up_x, up},
       w.unpacked, stream);
  hidden_kernel<<<grid(d_ff, n), kThreads, 0, stream>>>(w.gate, w.up, d_ff, layer.phi, thresholds,
                                                        w.h, bf16_stride(d_ff));
  check_launch("self_routed_batch neurons");
  gemm(blas,
       {layer.w_down, reads_down_by_columns(layer) ? layer.down_columns : nullptr,
        rounded(w.h, n, d_ff), y},
       w.unpacked, stream);
}

}  // namespace moesaic::cuda
