#include <array>

#include "kernels/cuda/base/check.h"
#include "kernels/cuda/base/operands.h"
#include "kernels/cuda/linear.cuh"
#include "kernels/cuda/linear.h"

namespace moesaic::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxTokens = 8;  // per pass over W

template <class Format, int kTokens>
__global__ void __launch_bounds__(kWarps* kWarp, min_blocks(kWarps))
    linear_kernel(const __grid_constant__ RowProducts products, std::int64_t first_token) {
  extern __shared__ __align__(16) std::uint8_t staged[];
  const int warp = threadIdx.x / kWarp;
  const std::int64_t row = std::int64_t{blockIdx.x} * kWarps + warp;
  if (row >= products.rows) return;
  row_times_tokens<Format, kTokens>(products, row, first_token,
                                    staged + warp * RowStream<Format>::kSharedBytes,
                                    threadIdx.x % kWarp);
}

template <class Format, int kTokens>
void launch(const RowProducts& products, std::int64_t first_token, StreamHandle stream) {
  linear_kernel<Format, kTokens>
      <<<static_cast<unsigned>(ceil_div(products.rows, kWarps)), kWarps * kWarp,
         kWarps * RowStream<Format>::kSharedBytes, stream>>>(products, first_token);
  check_launch("linear");
}

// Passes of 8 tokens, then of 4, 2 and 1.
template <class Format>
void launch_tokens(const RowProducts& products, std::int64_t n_tokens, StreamHandle stream) {
  std::int64_t t = 0;
  for (; t + kMaxTokens <= n_tokens; t += kMaxTokens) launch<Format, 8>(products, t, stream);
  if (n_tokens - t >= 4) launch<Format, 4>(products, t, stream), t += 4;
  if (n_tokens - t >= 2) launch<Format, 2>(products, t, stream), t += 2;
  if (n_tokens - t >= 1) launch<Format, 1>(products, t, stream);
}

void check_product(const Product& p, std::int64_t n_tokens) {
  require<ShapeError>(
      p.x.cols == p.w.cols && p.y.rows == p.x.rows && p.y.cols == p.w.rows && p.x.rows == n_tokens,
      "linear: X [{}, {}] by W [{}, {}] into Y [{}, {}], expected Y [{}, {}]", p.x.rows, p.x.cols,
      p.w.rows, p.w.cols, p.y.rows, p.y.cols, n_tokens, p.w.rows);
  require_weights("linear", p.w);
  require_aligned_rows("linear", p.x);
}

}  // namespace

void linear(std::span<const Product> products, StreamHandle stream) {
  require<ShapeError>(products.size() <= kMaxProducts, "linear: {} products, expected at most {}",
                      products.size(), kMaxProducts);
  if (products.empty()) return;
  const std::int64_t n_tokens = products[0].x.rows;
  for (const Product& p : products) check_product(p, n_tokens);
  std::array<bool, kMaxProducts> done{};
  for (std::size_t k = 0; k < products.size(); ++k) {
    RowProducts same{};
    for (std::size_t i = k; i < products.size(); ++i) {
      const Product& p = products[i];
      if (done[i] || p.w.dtype != products[k].w.dtype) continue;
      done[i] = true;
      if (p.w.rows == 0) continue;
      same.of[same.n++] = row_product(p, same.rows);
      same.rows += p.w.rows;
    }
    if (same.rows == 0) continue;
    visit_format(products[k].w.dtype,
                 [&]<class Format>() { launch_tokens<Format>(same, n_tokens, stream); });
  }
}

}  // namespace moesaic::cuda
