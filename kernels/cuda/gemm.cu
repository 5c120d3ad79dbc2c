#include <cuda_bf16.h>

#include <algorithm>

#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/base/row_stream.cuh"
#include "kernels/cuda/gemm.h"

namespace moesaic::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 256;
constexpr std::int64_t kRun = 4096;  // elements that a warp unpacks
// Elements of W at a time: 32 MiB stay in the second-level cache of what most would run this on,
// and are rows enough to fill a device with tiles of the product.
constexpr std::int64_t kPart = 16 << 20;

// Rows of X stand 16 bytes apart or a multiple, which cuBLAS's fast kernels want.
std::int64_t padded(std::int64_t cols) { return ceil_div(cols, 8) * 8; }

template <int kWidth>
__device__ void store_bf16(__nv_bfloat16* to, std::int64_t n, const float* v) {
  static_assert(kWidth == 2 || kWidth == 4);
  std::uint32_t bits[kWidth / 2];
  for (int i = 0; i < kWidth / 2; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
    bits[i] = *reinterpret_cast<const std::uint32_t*>(&pair);
  }
  if (n >= kWidth) {
    if constexpr (kWidth == 4) {
      *reinterpret_cast<uint2*>(to) = make_uint2(bits[0], bits[1]);
    } else {
      *reinterpret_cast<std::uint32_t*>(to) = bits[0];
    }
    return;
  }
  for (int i = 0; i < n; ++i) to[i] = __float2bfloat16_rn(v[i]);
}

// Elements [first, first + n) of a matrix, whole blocks, as if it were one row. A warp a run.
template <class Format>
__global__ void __launch_bounds__(kWarps* kWarp, min_blocks(kWarps))
    unpack_kernel(WeightBytes w, std::int64_t first, std::int64_t n, __nv_bfloat16* out) {
  extern __shared__ __align__(16) std::uint8_t staged[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::int64_t begin = (std::int64_t{blockIdx.x} * kWarps + warp) * kRun;
  if (begin >= n) return;
  RowStream<Format>::run(w, (first + begin) / Format::kElems * Format::kBytes, min(kRun, n - begin),
                         staged + warp * RowStream<Format>::kSharedBytes, lane,
                         [&](std::int64_t c, std::int64_t left, const float(&v)[8]) {
                           for (int i = 0; i < Format::kVectors; ++i) {
                             const int at = Format::column(lane, i);
                             store_bf16<Format::kWidth>(out + begin + c + at, left - at,
                                                        v + Format::kWidth * i);
                           }
                         });
}

// A thread rounds four neighbouring columns of a token.
__global__ void __launch_bounds__(kThreads)
    round_kernel(ConstMatrix x, __nv_bfloat16* out, std::int64_t stride) {
  const std::int64_t c = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * 4, t = blockIdx.y;
  if (c >= x.cols) return;
  float v[4];
  load_floats<4>(x.data + t * x.stride + c, x.cols - c, v);
  store_bf16<4>(out + t * stride + c, x.cols - c, v);
}

void unpack(const WeightView& w, std::int64_t first_row, std::int64_t n_rows, __nv_bfloat16* out,
            StreamHandle stream) {
  visit_format(w.dtype, [&]<class Format>() {
    const std::int64_t n = n_rows * w.cols;
    unpack_kernel<Format><<<static_cast<unsigned>(ceil_div(n, kRun * kWarps)), kWarps * kWarp,
                            kWarps * RowStream<Format>::kSharedBytes, stream>>>(
        {reinterpret_cast<const std::uint8_t*>(w.data), w.bytes()}, first_row * w.cols, n, out);
    check_launch("unpack");
  });
}

void check_product(const Product& p, std::int64_t n_tokens) {
  require<ShapeError>(
      p.x.cols == p.w.cols && p.y.rows == p.x.rows && p.y.cols == p.w.rows && p.x.rows == n_tokens,
      "gemm: X [{}, {}] by W [{}, {}] into Y [{}, {}], expected Y [{}, {}]", p.x.rows, p.x.cols,
      p.w.rows, p.w.cols, p.y.rows, p.y.cols, n_tokens, p.w.rows);
  require<ShapeError>(p.w.cols > 0, "gemm: W [{}, 0], expected columns", p.w.rows);
  require<ShapeError>(p.bias == nullptr, "gemm: a bias, expected none");
  constexpr std::int64_t kMaxTokens = 65535;  // CUDA's limit of a grid's second side
  require<ShapeError>(n_tokens <= kMaxTokens, "gemm: {} tokens, expected at most {}", n_tokens,
                      kMaxTokens);
  require_weights("gemm", p.w);
  require_aligned_rows("gemm", p.x);
}

}  // namespace

std::size_t gemm_workspace(std::int64_t n_tokens, std::int64_t max_cols,
                           std::int64_t max_elements) {
  const std::int64_t part = std::min(max_elements, std::max(kPart, max_cols));  // a row at least
  return static_cast<std::size_t>(n_tokens * padded(max_cols) + part) * sizeof(__nv_bfloat16);
}

void gemm(Blas& blas, std::span<const Product> products, std::span<std::byte> workspace,
          StreamHandle stream) {
  require<ShapeError>(products.size() <= kMaxProducts, "gemm: {} products, expected at most {}",
                      products.size(), kMaxProducts);
  if (products.empty()) return;
  const std::int64_t n_tokens = products[0].x.rows;
  for (const Product& p : products) check_product(p, n_tokens);
  if (n_tokens == 0) return;
  auto* rounded = reinterpret_cast<__nv_bfloat16*>(workspace.data());
  const auto room = static_cast<std::int64_t>(workspace.size() / sizeof(__nv_bfloat16));
  const auto bits = [](const __nv_bfloat16* p) {
    return reinterpret_cast<const std::uint16_t*>(p);
  };
  const float* held = nullptr;  // the X that `rounded` holds
  std::int64_t held_cols = 0;
  for (const Product& p : products) {
    if (p.w.rows == 0) continue;
    const std::int64_t cols = p.x.cols, stride = padded(cols), left = room - n_tokens * stride;
    const bool packed = p.w.dtype != DType::BF16;
    require<ShapeError>(left >= (packed ? cols : 0),
                        "gemm: workspace of {} bytes, expected {} tokens and a row of {}",
                        workspace.size(), n_tokens, cols);
    if (p.x.data != held || cols != held_cols) {
      const dim3 grid(static_cast<unsigned>(ceil_div(cols, 4 * kThreads)),
                      static_cast<unsigned>(n_tokens));
      round_kernel<<<grid, kThreads, 0, stream>>>(p.x, rounded, stride);
      check_launch("round to bfloat16");
      held = p.x.data;
      held_cols = cols;
    }
    const Bf16Matrix x(bits(rounded), n_tokens, cols, stride);
    if (!packed) {
      const auto* w = reinterpret_cast<const std::uint16_t*>(p.w.data);
      blas.multiply(x, Bf16Matrix(w, p.w.rows, cols), p.y, p.accumulate);
      continue;
    }
    __nv_bfloat16* part = rounded + n_tokens * stride;
    const std::int64_t most = left / cols;  // rows
    for (std::int64_t first = 0; first < p.w.rows; first += most) {
      const std::int64_t n = std::min(most, p.w.rows - first);
      unpack(p.w, first, n, part, stream);
      const Matrix y(p.y.data + first, n_tokens, n, p.y.stride);
      blas.multiply(x, Bf16Matrix(bits(part), n, cols), y, p.accumulate);
    }
  }
}

}  // namespace moesaic::cuda
