#include <algorithm>

#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/column_panels.cuh"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/base/row_stream.cuh"
#include "kernels/cuda/base/tensor_core.cuh"
#include "kernels/cuda/gemm.h"

namespace moesaic::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 256;
constexpr std::int64_t kRun = 4096;  // elements that a warp unpacks
// Elements of W at a time: 32 MiB stay in the second-level cache of what most would run this on,
// and are rows enough to fill a device with tiles of the product.
constexpr std::int64_t kPart = 16 << 20;

template <int kWidth>
__device__ void store_bf16(__nv_bfloat16* to, std::int64_t n, const float* v) {
  static_assert(kWidth == 2 || kWidth == 4);
  if (n >= kWidth) {
    if constexpr (kWidth == 4) {
      *reinterpret_cast<std::uint64_t*>(to) = bf16_four(v[0], v[1], v[2], v[3]);
    } else {
      *reinterpret_cast<std::uint32_t*>(to) = bf16_pair(v[0], v[1]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (i < n) to[i] = __float2bfloat16_rn(v[i]);
  }
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
#pragma unroll
                           for (int i = 0; i < Format::kVectors; ++i) {
                             const int at = Format::column(lane, i);
                             store_bf16<Format::kWidth>(out + begin + c + at, left - at,
                                                        v + Format::kWidth * i);
                           }
                         });
}

// n_rows rows from a panel's first on. A warp takes a unit of a panel, a lane eight of its rows in
// each of eight neighbouring columns: eight lanes read a column, whole sectors, and a lane writes a
// row's eight columns at once. Values so change from columns to rows in registers.
template <class Format>
__global__ void __launch_bounds__(kWarps* kWarp, min_blocks(kWarps))
    unpack_columns_kernel(const std::uint8_t* panels, std::int64_t n_rows, std::int64_t cols,
                          __nv_bfloat16* out, std::int64_t stride) {
  constexpr int kEach = kColumnUnit * kColumnLanes / kWarp;  // columns of a lane
  static_assert(kEach == 8);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int group = lane / kColumnLanes, l = lane % kColumnLanes;
  const std::int64_t n_units = (cols + kColumnUnit - 1) / kColumnUnit;
  const std::int64_t item = std::int64_t{blockIdx.x} * kWarps + warp;
  const std::int64_t first_row = item / n_units * kColumnRows;
  const std::int64_t first_column = item % n_units * kColumnUnit + kEach * group;
  if (first_row >= n_rows || first_column >= cols) return;
  const std::uint8_t* unit = panels + item * Format::kUnitBytes;
  typename Format::Scales scales;
  scales.load(unit, l);
  typename Format::Codes codes[kEach];
#pragma unroll
  for (int c = 0; c < kEach; ++c) {
    codes[c].load(unit + Format::kScaleBytes + (kEach * group + c) * Format::Codes::kBytes, l);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const std::int64_t row = first_row + i / 4 * 32 + 4 * l + i % 4;
    if (row >= n_rows) continue;
    // The value of one code: exact but for the one rounding that rows have too.
    const auto v = [&](int c) { return scales.apply(i, codes[c][i], 1.0f); };
    // The builtin keeps the four words one store; a plain one the compiler takes apart.
    __stwb(reinterpret_cast<uint4*>(out + row * stride + first_column),
           make_uint4(bf16_pair(v(0), v(1)), bf16_pair(v(2), v(3)), bf16_pair(v(4), v(5)),
                      bf16_pair(v(6), v(7))));
  }
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

void unpack_rows(const WeightView& w, std::int64_t first_row, std::int64_t n_rows,
                 __nv_bfloat16* out, StreamHandle stream) {
  visit_format(w.dtype, [&]<class Format>() {
    const std::int64_t n = n_rows * w.cols;
    unpack_kernel<Format><<<static_cast<unsigned>(ceil_div(n, kRun * kWarps)), kWarps * kWarp,
                            kWarps * RowStream<Format>::kSharedBytes, stream>>>(
        {reinterpret_cast<const std::uint8_t*>(w.data), w.bytes()}, first_row * w.cols, n, out);
    check_launch("unpack");
  });
}

// From the first row of a panel.
void unpack_columns(const Bf16Product& p, std::int64_t first_row, std::int64_t n_rows,
                    __nv_bfloat16* out, StreamHandle stream) {
  const ColumnPanels layout = column_panels(p.w);
  const std::int64_t panel_bytes = layout.n_units * layout.unit_bytes();
  const std::int64_t n_items = ceil_div(n_rows, kColumnRows) * layout.n_units;
  visit_column_format(p.w.dtype, [&]<class Format>() {
    unpack_columns_kernel<Format>
        <<<static_cast<unsigned>(ceil_div(n_items, kWarps)), kWarps * kWarp, 0, stream>>>(
            reinterpret_cast<const std::uint8_t*>(p.columns) +
                first_row / kColumnRows * panel_bytes,
            n_rows, p.w.cols, out, bf16_stride(p.w.cols));
    check_launch("unpack columns");
  });
}

template <class X>
void check_product(const WeightView& w, const X& x, Matrix y) {
  require<ShapeError>(
      x.cols == w.cols && y.rows == x.rows && y.cols == w.rows,
      "gemm: X [{}, {}] by W [{}, {}] into Y [{}, {}], expected Y [{}, {}] and X [{}, {}]", x.rows,
      x.cols, w.rows, w.cols, y.rows, y.cols, x.rows, w.rows, x.rows, w.cols);
  require<ShapeError>(w.cols > 0, "gemm: W [{}, 0], expected columns", w.rows);
  require_weights("gemm", w);
}

void check_product(const Product& p, std::int64_t n_tokens) {
  check_product(p.w, p.x, p.y);
  require<ShapeError>(p.bias == nullptr, "gemm: a bias, expected none");
  require<ShapeError>(p.x.rows == n_tokens, "gemm: {} tokens after products of {}", p.x.rows,
                      n_tokens);
  constexpr std::int64_t kMaxTokens = 65535;  // CUDA's limit of a grid's second side
  require<ShapeError>(n_tokens <= kMaxTokens, "gemm: {} tokens, expected at most {}", n_tokens,
                      kMaxTokens);
  require_aligned_rows("gemm", p.x);
}

const std::uint16_t* bits(const __nv_bfloat16* p) {
  return reinterpret_cast<const std::uint16_t*>(p);
}

// In panels columns may fill rows up, which then stand so in the workspace.
std::int64_t stride_of(const Bf16Product& p) {
  return p.columns != nullptr ? bf16_stride(p.w.cols) : p.w.cols;
}

bool is_read_in_place(const Bf16Product& p) {
  return p.w.dtype == DType::BF16 && p.columns == nullptr;
}

// Rows of W that are unpacked at a time: what there is room for, whole panels if not all.
std::int64_t rows_at_once(const Bf16Product& p, std::span<std::byte> workspace) {
  if (is_read_in_place(p)) return p.w.rows;
  const std::int64_t step = p.columns != nullptr ? kColumnRows : 1;
  const std::int64_t row_bytes = stride_of(p) * std::int64_t{sizeof(__nv_bfloat16)};
  const std::int64_t room = std::ssize(workspace) / row_bytes;
  const std::int64_t rows = room >= p.w.rows ? p.w.rows : room / step * step;
  require<ShapeError>(rows > 0 || p.w.rows == 0, "gemm: workspace of {} bytes for W, expected {}",
                      workspace.size(), std::min(p.w.rows, step) * row_bytes);
  return rows;
}

void multiply(Blas& blas, const Bf16Product& p, std::int64_t rows_at_once,
              std::span<std::byte> workspace, StreamHandle stream) {
  if (is_read_in_place(p)) {
    const auto* w = reinterpret_cast<const std::uint16_t*>(p.w.data);
    blas.multiply(p.x, Bf16Matrix(w, p.w.rows, p.w.cols), p.y, p.accumulate);
    return;
  }
  auto* part = reinterpret_cast<__nv_bfloat16*>(workspace.data());
  for (std::int64_t first = 0; first < p.w.rows; first += rows_at_once) {
    const std::int64_t n = std::min(rows_at_once, p.w.rows - first);
    if (p.columns != nullptr) {
      unpack_columns(p, first, n, part, stream);
    } else {
      unpack_rows(p.w, first, n, part, stream);
    }
    const Matrix y(p.y.data + first, p.y.rows, n, p.y.stride);
    blas.multiply(p.x, Bf16Matrix(bits(part), n, p.w.cols, stride_of(p)), y, p.accumulate);
  }
}

}  // namespace

std::size_t gemm_workspace(std::int64_t n_tokens, std::int64_t max_cols,
                           std::int64_t max_elements) {
  const std::int64_t row = bf16_stride(max_cols);
  const std::int64_t part = std::min(max_elements, std::max(kPart, kColumnRows * row));
  return static_cast<std::size_t>(n_tokens * row + part) * sizeof(__nv_bfloat16);
}

void gemm(Blas& blas, const Bf16Product& product, std::span<std::byte> workspace,
          StreamHandle stream) {
  WeightView read = product.w;
  if (product.columns != nullptr) read.data = product.columns;
  check_product(read, product.x, product.y);
  const std::int64_t at_once = rows_at_once(product, workspace);
  if (product.x.rows > 0) multiply(blas, product, at_once, workspace, stream);
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
  const float* held = nullptr;  // the X that `rounded` holds
  std::int64_t held_cols = 0;
  for (const Product& p : products) {
    if (p.w.rows == 0) continue;
    const std::int64_t cols = p.x.cols, stride = bf16_stride(cols);
    const auto used = static_cast<std::size_t>(n_tokens * stride) * sizeof(__nv_bfloat16);
    require<ShapeError>(used <= workspace.size(),
                        "gemm: workspace of {} bytes, expected {} for {} tokens alone",
                        workspace.size(), used, n_tokens);
    const std::span<std::byte> left = workspace.subspan(used);
    const Bf16Matrix x(bits(rounded), n_tokens, cols, stride);
    const Bf16Product product{p.w, nullptr, x, p.y, p.accumulate};
    const std::int64_t at_once = rows_at_once(product, left);
    if (p.x.data != held || cols != held_cols) {
      const dim3 grid(static_cast<unsigned>(ceil_div(cols, 4 * kThreads)),
                      static_cast<unsigned>(n_tokens));
      round_kernel<<<grid, kThreads, 0, stream>>>(p.x, rounded, stride);
      check_launch("round to bfloat16");
      held = p.x.data;
      held_cols = cols;
    }
    multiply(blas, product, at_once, left, stream);
  }
}

}  // namespace moesaic::cuda
