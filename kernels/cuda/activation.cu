#include "kernels/cuda/activate.cuh"
#include "kernels/cuda/activation.h"
#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/operands.h"

namespace moesaic::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    gated_activation_kernel(kernels::Activation phi, ConstMatrix gate, ConstMatrix up, Matrix h) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t t = blockIdx.y;
  if (i >= h.cols) return;
  h.data[t * h.stride + i] =
      phi_of(phi, gate.data[t * gate.stride + i]) * up.data[t * up.stride + i];
}

}  // namespace

void gated_activation(kernels::Activation phi, ConstMatrix gate, ConstMatrix up, Matrix h,
                      StreamHandle stream) {
  require<ShapeError>(
      gate.rows == up.rows && gate.cols == up.cols && gate.rows == h.rows && gate.cols == h.cols,
      "activation: gate is [{}, {}], up is [{}, {}], output is [{}, {}], expected the same shape",
      gate.rows, gate.cols, up.rows, up.cols, h.rows, h.cols);
  if (h.rows == 0 || h.cols == 0) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(h.cols, kThreads)), static_cast<unsigned>(h.rows));
  gated_activation_kernel<<<grid, kThreads, 0, stream>>>(phi, gate, up, h);
  check_launch("gated_activation");
}

}  // namespace moesaic::cuda
