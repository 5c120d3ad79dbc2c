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
#include "kernels/cpu/matvec.h"
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

// Up to here unpacking in registers is faster than tiles and oneDNN (Zen 4, one thread, Q4_1
// [16384, 1536]: 4.3 ms per four tokens against 16 ms + 0.6 ms per token in float32, 8 + 0.27 in
// bfloat16).
constexpr std::int64_t kMatvecTokens = 12;

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
    matvec_rows(w, range, x, y, accumulate);
  });
}

void unpack_rows(const WeightView& w, Range rows, float* to) {
  for (std::int64_t r = rows.begin; r < rows.end; ++r, to += w.cols) {
    dequantize_row(w.dtype, w.row(r), {to, static_cast<std::size_t>(w.cols)});
  }
}

void unpack_rows(const WeightView& w, Range rows, std::uint16_t* to) {
  for (std::int64_t r = rows.begin; r < rows.end; ++r, to += w.cols) {
    dequantize_row_bf16(w.dtype, w.row(r), {to, static_cast<std::size_t>(w.cols)});
  }
}

void multiply(const Gemm& g, const float* a, const float* b, float* c) { gemm_f32(g, a, b, c); }

void multiply(const Gemm& g, const std::uint16_t* a, const std::uint16_t* b, float* c) {
  gemm_bf16(g, a, b, c);
}

/// x [n_tokens, cols] with `stride` elements from row to row.
template <class T>
void linear_tiles(Context& ctx, const WeightView& w, const T* x, std::int64_t stride, Matrix y,
                  bool accumulate) {
  const Workspace::Scope scope(ctx.workspace);
  const int n_threads = ctx.pool.n_threads();
  const auto row_bytes = static_cast<std::int64_t>(sizeof(T)) * w.cols;
  const std::int64_t tile_rows =
      std::clamp<std::int64_t>(kTileBytes / row_bytes / 16 * 16, 16, (w.rows + 15) / 16 * 16);
  const auto weights_size = static_cast<std::size_t>(tile_rows * w.cols);
  const auto product_size = static_cast<std::size_t>(tile_rows * y.rows);
  const auto threads = static_cast<std::size_t>(n_threads);
  T* weights = ctx.workspace.take<T>(threads * weights_size).data();
  float* products = ctx.workspace.take<float>(threads * product_size).data();
  ctx.pool.run([&](int thread) {
    T* tile = weights + static_cast<std::size_t>(thread) * weights_size;
    float* product = products + static_cast<std::size_t>(thread) * product_size;
    const Range range = split(w.rows, n_threads, thread, 16);
    for (std::int64_t first = range.begin; first < range.end; first += tile_rows) {
      const std::int64_t n = std::min(tile_rows, range.end - first);
      unpack_rows(w, {first, first + n}, tile);
      // Into rows of its own: into strided ones oneDNN takes up to four times as long.
      multiply({.trans_b = true,
                .m = y.rows,
                .n = n,
                .k = w.cols,
                .lda = stride,
                .ldb = w.cols,
                .ldc = n},
               x, tile, product);
      for (std::int64_t t = 0; t < y.rows; ++t) {
        const float* from = product + t * n;
        float* to = y.row(t) + first;
        if (accumulate) {
          for (std::int64_t i = 0; i < n; ++i) to[i] += from[i];
        } else {
          std::copy_n(from, n, to);
        }
      }
    }
  });
}

void linear_many(Context& ctx, const WeightView& w, ConstMatrix x, Matrix y, bool accumulate) {
  if (ctx.activations != Activations::BF16) {
    return linear_tiles(ctx, w, x.data, x.stride, y, accumulate);
  }
  const Workspace::Scope scope(ctx.workspace);
  const auto cols = static_cast<std::size_t>(x.cols);
  const std::span<std::uint16_t> bits =
      ctx.workspace.take<std::uint16_t>(static_cast<std::size_t>(x.rows) * cols);
  ctx.pool.run([&](int thread) {
    const Range tokens = split(x.rows, ctx.pool.n_threads(), thread);
    for (std::int64_t t = tokens.begin; t < tokens.end; ++t) {
      to_bf16_bits(x.row(t), cols, bits.data() + static_cast<std::size_t>(t) * cols);
    }
  });
  linear_tiles(ctx, w, static_cast<const std::uint16_t*>(bits.data()), x.cols, y, accumulate);
}

}  // namespace

void matvec_rows(const WeightView& w, Range rows, ConstMatrix x, Matrix y, bool accumulate) {
  HWY_DYNAMIC_DISPATCH(linear_rows)(w, rows, x, y, accumulate);
}

void to_bf16_bits(const float* src, std::size_t n, std::uint16_t* dst) {
  HWY_DYNAMIC_DISPATCH(bf16_bits_span)(src, n, dst);
}

void check_linear_shapes(const WeightView& w, ConstMatrix x, Matrix y) {
  require<ShapeError>(x.cols == w.cols && y.rows == x.rows && y.cols == w.rows,
                      "linear: X [{}, {}] by W [{}, {}] into Y [{}, {}], expected Y [{}, {}]",
                      x.rows, x.cols, w.rows, w.cols, y.rows, y.cols, x.rows, w.rows);
}

void linear(Context& ctx, const WeightView& w, ConstMatrix x, Matrix y, Traffic traffic,
            bool accumulate) {
  check_linear_shapes(w, x, y);
  const DTypeTraits& t = traits(w.dtype);
  require<ShapeError>(w.cols % t.block_elems == 0,
                      "linear: {} rows of {} elements, expected a multiple of {}", t.name, w.cols,
                      t.block_elems);
  if (x.rows == 0 || w.rows == 0) return;
  obey_target_environment();
  if (ctx.activations == Activations::Q16 && w.panels != nullptr) {
    const LinearOutput output{w, y, accumulate};
    return linear_group(ctx, {.x = x, .norm = {}}, {&output, 1}, traffic);
  }
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
