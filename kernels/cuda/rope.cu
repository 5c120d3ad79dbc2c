#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/rope.h"

namespace moesaic::cuda {
namespace {

constexpr int kThreads = 128;

// Both of an angle of any size. Turns are reduced in double, exact enough for angles below 2^24;
// sincosf's own reduction of large angles takes local memory.
__device__ void sine_and_cosine(float angle, float* sine, float* cosine) {
  constexpr double kInversePi = 0.31830988618379067;
  const double half_turns = static_cast<double>(angle) * kInversePi;
  sincospif(static_cast<float>(half_turns - 2 * rint(half_turns / 2)), sine, cosine);
}

// One thread per pair of a row. The angle is the float32 product, as on the CPU.
__global__ void __launch_bounds__(kThreads)
    rope_kernel(float* x, std::int64_t stride, std::int64_t n_pairs, int half,
                const std::int32_t* positions, const float* freq, bool interleaved) {
  const std::int64_t pair = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (pair >= n_pairs) return;
  const std::int64_t head = pair / half;
  const int i = static_cast<int>(pair % half);
  float* at = x + blockIdx.y * stride + head * 2 * half + (interleaved ? 2 * i : i);
  const int second = interleaved ? 1 : half;
  float sin, cos;
  sine_and_cosine(__fmul_rn(static_cast<float>(positions[blockIdx.y]), freq[i]), &sin, &cos);
  const float a = at[0], b = at[second];
  at[0] = a * cos - b * sin;
  at[second] = a * sin + b * cos;
}

}  // namespace

void rope(Matrix x, int head_dim, const std::int32_t* positions, const float* freq,
          kernels::RopeStyle style, StreamHandle stream) {
  require<ShapeError>(head_dim > 0 && head_dim % 2 == 0,
                      "rope: head_dim is {}, expected a positive even number", head_dim);
  require<ShapeError>(x.cols % head_dim == 0,
                      "rope: rows hold {} elements, expected a multiple of head_dim {}", x.cols,
                      head_dim);
  if (x.rows == 0 || x.cols == 0) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(x.cols / 2, kThreads)),
                  static_cast<unsigned>(x.rows));
  rope_kernel<<<grid, kThreads, 0, stream>>>(x.data, x.stride, x.cols / 2, head_dim / 2, positions,
                                             freq, style == kernels::RopeStyle::Interleaved);
  check_launch("rope");
}

}  // namespace moesaic::cuda
