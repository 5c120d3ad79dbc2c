#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/base/row_stream.cuh"
#include "kernels/cuda/embedding.h"

namespace moesaic::cuda {
namespace {

constexpr int kWarps = 4;

// One warp per token and chunk of columns.
template <class Format>
__global__ void __launch_bounds__(kWarps* kWarp)
    embed_kernel(WeightBytes table, std::int64_t vocab_size, std::int64_t cols,
                 const std::int32_t* ids, float scale, float* x, std::int64_t x_stride) {
  constexpr int kChunk = RowStream<Format>::kChunk;
  __shared__ alignas(16) std::uint8_t staged[kWarps * RowStream<Format>::kSharedBytes];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const std::int64_t first = (std::int64_t{blockIdx.x} * kWarps + warp) * kChunk;
  if (first >= cols) return;
  const std::int64_t n = min(cols - first, static_cast<std::int64_t>(kChunk));
  float* row = x + blockIdx.y * x_stride + first;
  const std::int32_t id = ids[blockIdx.y];
  if (id < 0 || id >= vocab_size) {
    for (std::int64_t i = lane; i < n; i += kWarp) row[i] = nanf("");
    return;
  }
  const std::int64_t begin = (id * cols + first) / Format::kElems * Format::kBytes;
  RowStream<Format>::run(table, begin, n, staged + warp * RowStream<Format>::kSharedBytes, lane,
                         [&](std::int64_t c, std::int64_t left, float(&values)[8]) {
                           for (float& v : values) v = __fmul_rn(v, scale);
                           for (int v = 0; v < Format::kVectors; ++v) {
                             const int at = Format::column(lane, v);
                             store_floats<Format::kWidth>(row + c + at, left - at,
                                                          values + Format::kWidth * v);
                           }
                         });
}

}  // namespace

void embed(const WeightView& table, const std::int32_t* ids, float scale, Matrix x,
           StreamHandle stream) {
  require<ShapeError>(x.cols == table.cols, "embedding: output has {} columns, expected {}", x.cols,
                      table.cols);
  require_weights("embedding", table);
  require_aligned_rows("embedding", x);
  if (x.rows == 0 || x.cols == 0) return;
  const WeightBytes bytes{reinterpret_cast<const std::uint8_t*>(table.data), table.bytes()};
  visit_format(table.dtype, [&]<class Format>() {
    const dim3 grid(static_cast<unsigned>(ceil_div(x.cols, kWarps * RowStream<Format>::kChunk)),
                    static_cast<unsigned>(x.rows));
    embed_kernel<Format><<<grid, kWarps * kWarp, 0, stream>>>(bytes, table.rows, table.cols, ids,
                                                              scale, x.data, x.stride);
    check_launch("embed");
  });
}

}  // namespace moesaic::cuda
