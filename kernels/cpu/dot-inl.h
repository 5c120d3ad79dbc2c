// Products of packed rows with float32 vectors. Per-target header: included once for each
// instruction set.
#if defined(MOESAIC_KERNELS_CPU_DOT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOESAIC_KERNELS_CPU_DOT_INL_H_
#undef MOESAIC_KERNELS_CPU_DOT_INL_H_
#else
#define MOESAIC_KERNELS_CPU_DOT_INL_H_
#endif

#include <algorithm>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/base/thread_pool.h"
#include "kernels/base/view.h"
#include "kernels/cpu/unpack-inl.h"
#include "kernels/quant.h"

HWY_BEFORE_NAMESPACE();
namespace moesaic::kernels {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128

// No vectors: rows are unpacked through dequantize_row, piece by piece, and the compiler makes what
// it can of the loops.
struct AnyFormat {
  DType dtype;
};

inline constexpr std::size_t kPiece = 256;  // a whole number of blocks of every format
inline constexpr std::size_t kSums = 16;    // independent, so that they vectorise

template <class Fn>
void visit_format(DType dtype, Fn&& fn) {
  fn(AnyFormat{dtype});
}

inline constexpr AnyFormat kPlain{DType::F32};

/// fn(first, n, values of elements [first, first + n)) for the pieces of a row.
template <class Fn>
void for_each_piece(DType dtype, const std::uint8_t* row, std::size_t cols, Fn&& fn) {
  float values[kPiece];
  for (std::size_t first = 0; first < cols; first += kPiece) {
    const std::size_t n = std::min(kPiece, cols - first);
    const std::int64_t offset = row_bytes(dtype, static_cast<std::int64_t>(first));
    dequantize_row(dtype, reinterpret_cast<const std::byte*>(row) + offset, {values, n});
    fn(first, n, values);
  }
}

template <std::size_t n_x>
void dot(AnyFormat format, const std::uint8_t* row, std::size_t cols, const float* const (&x)[n_x],
         float (&out)[n_x]) {
  float sum[n_x][kSums] = {};
  for_each_piece(format.dtype, row, cols, [&](std::size_t first, std::size_t n, const float* w) {
    for (std::size_t t = 0; t < n_x; ++t) {
      const float* at = x[t] + first;
      std::size_t i = 0;
      for (; i + kSums <= n; i += kSums) {
        for (std::size_t j = 0; j < kSums; ++j) sum[t][j] += w[i + j] * at[i + j];
      }
      for (; i < n; ++i) sum[t][i % kSums] += w[i] * at[i];
    }
  });
  for (std::size_t t = 0; t < n_x; ++t) {
    out[t] = 0;
    for (const float s : sum[t]) out[t] += s;
  }
}

template <std::size_t n_rows>
void add_scaled(AnyFormat format, const std::uint8_t* const (&rows)[n_rows], std::size_t cols,
                const float (&scale)[n_rows], float* HWY_RESTRICT y) {
  for (std::size_t r = 0; r < n_rows; ++r) {
    for_each_piece(format.dtype, rows[r], cols,
                   [&](std::size_t first, std::size_t n, const float* HWY_RESTRICT w) {
                     for (std::size_t i = 0; i < n; ++i) y[first + i] += scale[r] * w[i];
                   });
  }
}

#else

inline constexpr PackedF32 kPlain;

HWY_INLINE float sum_lanes(V v) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  return _mm512_reduce_add_ps(v.raw);
#else
  return hn::GetLane(hn::SumOfLanes(DF(), v));
#endif
}

/// out[t] = Σ_i row[i] · x_t[i]. Each sum is made of the same operations in the same order whatever
/// n_x is, so that a token's results do not depend on its batch. One row at a time: the hardware
/// prefetches a single stream, and two or four rows side by side took twice as long from memory
/// (Zen 4).
template <class Format, std::size_t n_x>
HWY_INLINE void dot(Format, const std::uint8_t* row, std::size_t cols, const float* const (&x)[n_x],
                    float (&out)[n_x]) {
  const DF df;
  constexpr std::size_t kParts = Format::kElems / Format::kPart;
  V sum[n_x][2];
  unroll<n_x>([&](auto t) MOESAIC_LAMBDA { sum[t][0] = sum[t][1] = hn::Zero(df); });
  const std::size_t n_units = cols / Format::kElems;
  for (std::size_t u = 0; u < n_units; ++u) {
    const typename Format::Block block(row + u * Format::kBytes);
    for (std::size_t part = 0; part < kParts; ++part) {
      const std::size_t first = u * Format::kElems + part * Format::kPart;
      block.unpack(part, [&](auto j, V w) MOESAIC_LAMBDA {
        unroll<n_x>([&](auto t) MOESAIC_LAMBDA {
          sum[t][j % 2] = hn::MulAdd(w, hn::LoadU(df, x[t] + first + j * kLanes), sum[t][j % 2]);
        });
      });
    }
  }
  // Block formats have no tail: a row is whole blocks.
  if (const std::size_t tail = cols % Format::kElems; Format::kElems == 32 && tail != 0) {
    alignas(64) std::uint8_t row_tail[Format::kBytes] = {};
    alignas(64) float x_tail[n_x][Format::kElems] = {};
    std::memcpy(row_tail, row + n_units * Format::kBytes, tail * Format::kBytes / Format::kElems);
    for (std::size_t t = 0; t < n_x; ++t) {
      std::memcpy(x_tail[t], x[t] + cols - tail, tail * sizeof(float));
    }
    const typename Format::Block block(row_tail);
    block.unpack(0, [&](auto j, V w) MOESAIC_LAMBDA {
      unroll<n_x>([&](auto t) MOESAIC_LAMBDA {
        sum[t][j % 2] = hn::MulAdd(w, hn::Load(df, x_tail[t] + j * kLanes), sum[t][j % 2]);
      });
    });
  }
  unroll<n_x>([&](auto t) MOESAIC_LAMBDA { out[t] = sum_lanes(hn::Add(sum[t][0], sum[t][1])); });
}

/// y[i] += Σ_r scale[r] · row_r[i], rows added in order.
template <class Format, std::size_t n_rows>
HWY_INLINE void add_scaled(Format, const std::uint8_t* const (&rows)[n_rows], std::size_t cols,
                           const float (&scale)[n_rows], float* HWY_RESTRICT y) {
  const DF df;
  constexpr std::size_t kParts = Format::kElems / Format::kPart;
  constexpr std::size_t kVectors = Format::kPart / kLanes;
  const auto add_block = [&](const std::uint8_t* const(&at)[n_rows],
                             float* HWY_RESTRICT out) MOESAIC_LAMBDA {
    [&]<std::size_t... r>(std::index_sequence<r...>) MOESAIC_LAMBDA {
      const typename Format::Block blocks[n_rows] = {typename Format::Block(at[r])...};
      for (std::size_t part = 0; part < kParts; ++part, out += Format::kPart) {
        // A part of y stays in registers while all rows are added to it.
        V sum[kVectors];
        unroll<kVectors>([&](auto j) MOESAIC_LAMBDA { sum[j] = hn::LoadU(df, out + j * kLanes); });
        (blocks[r].unpack(
             part, [&](auto j, V w)
                       MOESAIC_LAMBDA { sum[j] = hn::MulAdd(hn::Set(df, scale[r]), w, sum[j]); }),
         ...);
        unroll<kVectors>([&](auto j) MOESAIC_LAMBDA { hn::StoreU(sum[j], df, out + j * kLanes); });
      }
    }
    (std::make_index_sequence<n_rows>{});
  };
  const std::size_t n_units = cols / Format::kElems;
  for (std::size_t u = 0; u < n_units; ++u) {
    const std::uint8_t* at[n_rows];
    unroll<n_rows>([&](auto r) MOESAIC_LAMBDA { at[r] = rows[r] + u * Format::kBytes; });
    add_block(at, y + u * Format::kElems);
  }
  if (const std::size_t tail = cols % Format::kElems; Format::kElems == 32 && tail != 0) {
    alignas(64) std::uint8_t row_tail[n_rows][Format::kBytes] = {};
    alignas(64) float y_tail[Format::kElems] = {};
    const std::uint8_t* at[n_rows];
    for (std::size_t r = 0; r < n_rows; ++r) {
      std::memcpy(row_tail[r], rows[r] + n_units * Format::kBytes,
                  tail * Format::kBytes / Format::kElems);
      at[r] = row_tail[r];
    }
    std::memcpy(y_tail, y + cols - tail, tail * sizeof(float));
    add_block(at, y_tail);
    std::memcpy(y + cols - tail, y_tail, tail * sizeof(float));
  }
}

#endif

/// y[t][r] (+)= w_r · x_t for the rows in `range` and 1 to n_x tokens; a group that is not full
/// repeats its last token and drops the copies.
template <std::size_t n_x, class Format>
HWY_INLINE void matvec_group(Format format, const WeightView& w, Range range, ConstMatrix x,
                             Matrix y, bool accumulate) {
  const float* xs[n_x];
  for (std::size_t t = 0; t < n_x; ++t) {
    xs[t] = x.row(std::min(static_cast<std::int64_t>(t), x.rows - 1));
  }
  for (std::int64_t r = range.begin; r < range.end; ++r) {
    float out[n_x];
    dot(format, reinterpret_cast<const std::uint8_t*>(w.row(r)), static_cast<std::size_t>(w.cols),
        xs, out);
    for (std::size_t t = 0; t < n_x && static_cast<std::int64_t>(t) < x.rows; ++t) {
      float& to = y.row(static_cast<std::int64_t>(t))[r];
      to = accumulate ? to + out[t] : out[t];
    }
  }
}

/// Y[:, range] (+)= X W[range, :]ᵀ on the calling thread, each row of W unpacked once per four
/// tokens.
HWY_INLINE void matvec(const WeightView& w, Range range, ConstMatrix x, Matrix y, bool accumulate) {
  visit_format(w.dtype, [&](auto format) HWY_ATTR {
    if (x.rows == 1) return matvec_group<1>(format, w, range, x, y, accumulate);
    for (std::int64_t t = 0; t < x.rows; t += 4) {
      const std::int64_t n = std::min<std::int64_t>(x.rows - t, 4);
      matvec_group<4>(format, w, range, x.slice(t, n), y.slice(t, n), accumulate);
    }
  });
}

/// out[i] = bf16(x[i]) as float32, nearest even.
HWY_INLINE void round_bf16(const float* x, std::size_t n, float* out) {
  for (std::size_t i = 0; i < n; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
    const std::uint32_t nan = (bits & 0xffff0000u) | 0x400000u;
    const std::uint32_t result = (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
    std::memcpy(out + i, &result, sizeof(result));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
