#include "kernels/linear.h"

// Machines without AVX2 take the portable code: two more instruction sets are not worth their
// compile time.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/linear.cc"
#include "hwy/foreach_target.h"  // compiles this file once per instruction set
// The namespace macros of highway.h belong to the target that foreach_target.h has just set.
#include "hwy/highway.h"
//
#include <algorithm>

#include "kernels/base/error.h"
#include "kernels/cpu/dot-inl.h"
#include "kernels/cpu/onednn.h"
#include "kernels/cpu/target.h"
#include "kernels/quant.h"

HWY_BEFORE_NAMESPACE();
namespace moesaic::kernels {
namespace HWY_NAMESPACE {
namespace {

void linear_rows(const WeightView& w, Range range, ConstMatrix x, Matrix y, bool accumulate) {
  matvec(w, range, x, y, accumulate);
}

void round_span(const float* x, std::size_t n, float* out) { round_bf16(x, n, out); }

void bf16_bits_span(const float* HWY_RESTRICT x, std::size_t n, std::uint16_t* HWY_RESTRICT out) {
  for (std::size_t i = 0; i < n; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const std::uint32_t nan = bits >> 16 | 0x40u;
    out[i] = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moesaic::kernels {
namespace {

HWY_EXPORT(linear_rows);
HWY_EXPORT(round_span);
HWY_EXPORT(bf16_bits_span);

// Up to here unpacking in registers is faster than tiles and oneDNN.
constexpr std::int64_t kMatvecTokens = 8;

// A tile of unpacked rows stays in the second-level cache.
constexpr std::int64_t kTileBytes = 512 * 1024;

void linear_few(Context& ctx, const WeightView& w, ConstMatrix x, Matrix y, bool accumulate) {
  const Workspace::Scope scope(ctx.workspace);
  if (ctx.activations == Activations::BF16) {
    const std::span<float> rounded =
        ctx.workspace.take<float>(static_cast<std::size_t>(x.rows * x.cols));
    Matrix to(rounded.data(), x.rows, x.cols);
    for (std::int64_t t = 0; t < x.rows; ++t) {
      HWY_DYNAMIC_DISPATCH(round_span)(x.row(t), static_cast<std::size_t>(x.cols), to.row(t));
    }
    x = to;
  }
  ctx.pool.run([&](int thread) {
    const Range range = split(w.rows, ctx.pool.n_threads(), thread);
    HWY_DYNAMIC_DISPATCH(linear_rows)(w, range, x, y, accumulate);
  });
}

void linear_many(Context& ctx, const WeightView& w, ConstMatrix x, Matrix y, bool accumulate) {
  const Workspace::Scope scope(ctx.workspace);
  const bool bf16 = ctx.activations == Activations::BF16;
  const int n_threads = ctx.pool.n_threads();
  const auto cols = static_cast<std::size_t>(w.cols);
  const std::int64_t row_bytes = w.cols * (bf16 ? 2 : 4);
  const std::int64_t tile_rows =
      std::clamp<std::int64_t>(kTileBytes / row_bytes / 16 * 16, 16, (w.rows + 15) / 16 * 16);
  const auto tile_elems = static_cast<std::size_t>(tile_rows) * cols;
  const std::span<std::byte> tiles = ctx.workspace.take<std::byte>(
      static_cast<std::size_t>(n_threads) * tile_elems * (bf16 ? 2 : 4));
  std::span<std::uint16_t> x_bits;
  if (bf16) x_bits = ctx.workspace.take<std::uint16_t>(static_cast<std::size_t>(x.rows) * cols);

  if (bf16) {
    ctx.pool.run([&](int thread) {
      const Range tokens = split(x.rows, n_threads, thread);
      for (std::int64_t t = tokens.begin; t < tokens.end; ++t) {
        to_bf16_bits(x.row(t), cols, x_bits.data() + static_cast<std::size_t>(t) * cols);
      }
    });
  }
  ctx.pool.run([&](int thread) {
    std::byte* tile = tiles.data() + static_cast<std::size_t>(thread) * tile_elems * (bf16 ? 2 : 4);
    const Range range = split(w.rows, n_threads, thread, 16);
    for (std::int64_t first = range.begin; first < range.end; first += tile_rows) {
      const std::int64_t n = std::min(tile_rows, range.end - first);
      const Gemm product{.trans_b = true,
                         .m = x.rows,
                         .n = n,
                         .k = w.cols,
                         .lda = bf16 ? w.cols : x.stride,
                         .ldb = w.cols,
                         .ldc = y.stride,
                         .beta = accumulate ? 1.0f : 0.0f};
      if (bf16) {
        auto* rows = reinterpret_cast<std::uint16_t*>(tile);
        for (std::int64_t r = 0; r < n; ++r) {
          dequantize_row_bf16(w.dtype, w.row(first + r),
                              {rows + static_cast<std::size_t>(r) * cols, cols});
        }
        gemm_bf16(product, x_bits.data(), rows, y.data + first);
      } else {
        auto* rows = reinterpret_cast<float*>(tile);
        for (std::int64_t r = 0; r < n; ++r) {
          dequantize_row(w.dtype, w.row(first + r),
                         {rows + static_cast<std::size_t>(r) * cols, cols});
        }
        gemm_f32(product, x.data, rows, y.data + first);
      }
    }
  });
}

}  // namespace

void to_bf16_bits(const float* src, std::size_t n, std::uint16_t* dst) {
  HWY_DYNAMIC_DISPATCH(bf16_bits_span)(src, n, dst);
}

void linear(Context& ctx, const WeightView& w, ConstMatrix x, Matrix y, Traffic traffic,
            bool accumulate) {
  require<ShapeError>(x.cols == w.cols && y.rows == x.rows && y.cols == w.rows,
                      "linear: X [{}, {}] by W [{}, {}] into Y [{}, {}], expected Y [{}, {}]",
                      x.rows, x.cols, w.rows, w.cols, y.rows, y.cols, x.rows, w.rows);
  const DTypeTraits& t = traits(w.dtype);
  require<ShapeError>(w.cols % t.block_elems == 0,
                      "linear: {} rows of {} elements, expected a multiple of {}", t.name, w.cols,
                      t.block_elems);
  if (x.rows == 0 || w.rows == 0) return;
  obey_target_environment();
  // Without columns there is nothing to multiply; the few-token path writes the zeros.
  if (x.rows <= kMatvecTokens || w.cols == 0) {
    linear_few(ctx, w, x, y, accumulate);
  } else {
    linear_many(ctx, w, x, y, accumulate);
  }
  ctx.tally.add(traffic, w.bytes());
}

void round_to_bf16(std::span<const float> src, std::span<float> dst) {
  require<ShapeError>(src.size() == dst.size(), "round_to_bf16: {} elements into {}", src.size(),
                      dst.size());
  HWY_DYNAMIC_DISPATCH(round_span)(src.data(), src.size(), dst.data());
}

}  // namespace moesaic::kernels
#endif  // HWY_ONCE
