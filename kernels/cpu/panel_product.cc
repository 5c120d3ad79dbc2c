#include "kernels/cpu/panel_product.h"

// Machines without AVX2 take the portable code: two more instruction sets are not worth their
// compile time.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/panel_product.cc"
#include "hwy/foreach_target.h"  // compiles this file once per instruction set
// The namespace macros of highway.h belong to the target that foreach_target.h has just set.
#include "hwy/highway.h"
//
#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels/cpu/onednn.h"
#include "kernels/cpu/panel-inl.h"
#include "kernels/panels.h"

#ifdef MOESAIC_PANEL_TARGET
HWY_PUSH_ATTRIBUTES(MOESAIC_PANEL_TARGET)
#else
HWY_BEFORE_NAMESPACE();
#endif
namespace moesaic::kernels {
namespace HWY_NAMESPACE {
namespace {

// ---- formats: where a unit's codes and scales stand (panels.h)
//
// Scales(header, i, row) reads those of unit i of a strip: d(part) and m(). codes<g>(unit, row) are
// the codes of columns [4g, 4g + 4). kBias is what codes are too high by; kParts how many scales a
// unit has.

struct PairScales {
  const Byte* p;
  HWY_INLINE PairScales(const Byte* header, int i, int row) : p(header + 32 * i + 2 * row) {}
  HWY_INLINE F d(int) const { return load_f16(p); }
  HWY_INLINE F m() const { return zero(); }
};

struct ScalesMin {
  const Byte* p;
  HWY_INLINE ScalesMin(const Byte* header, int, int row) : p(header + 2 * row) {}
  HWY_INLINE F d(int) const { return load_f16(p); }
  HWY_INLINE F m() const { return load_f16(p + 32); }
};

struct SubScalesMin {
  const Byte* super;
  const Byte* sub;
  HWY_INLINE SubScalesMin(const Byte* header, int i, int row)
      : super(header + 2 * row), sub(header + 64 + 32 * i + row) {}
  HWY_INLINE F d(int) const { return mul(load_f16(super), load_u8(sub)); }
  HWY_INLINE F m() const {
    static constexpr float kMinus = -1;
    return mul(mul(load_f16(super + 32), load_u8(sub + 16)), broadcast(&kMinus));
  }
};

struct SubScales {
  const Byte* super;
  const Byte* sub;
  HWY_INLINE SubScales(const Byte* header, int i, int row)
      : super(header + 2 * row), sub(header + 32 + 32 * i + row) {}
  HWY_INLINE F d(int part) const { return mul(load_f16(super), load_s8(sub + 16 * part)); }
  HWY_INLINE F m() const { return zero(); }
};

struct NibbleCodes {
  static constexpr std::int64_t kUnitBytes = 256;
  static constexpr bool kIsQ8 = false;
  template <int g>
  HWY_INLINE static U codes(const Byte* unit, int row) {
    const U both = load_codes(unit + 64 * (g % 4) + 4 * row);
    return g < 4 ? low_nibbles(both) : high_nibbles(both);
  }
};

struct FiveBitCodes {
  static constexpr std::int64_t kUnitBytes = 320;
  static constexpr bool kIsQ8 = false;
  template <int g>
  HWY_INLINE static U codes(const Byte* unit, int row) {
    return or_fifth_bits(NibbleCodes::codes<g>(unit, row), unit + 256 + 8 * g, row);
  }
};

struct SixBitCodes {
  static constexpr std::int64_t kUnitBytes = 384;
  static constexpr bool kIsQ8 = false;
  template <int g>
  HWY_INLINE static U codes(const Byte* unit, int row) {
    return or_pairs<g % 4>(NibbleCodes::codes<g>(unit, row),
                           load_codes(unit + 256 + 64 * (g / 4) + 4 * row));
  }
};

struct ByteCodes {
  static constexpr std::int64_t kUnitBytes = 512;
  static constexpr bool kIsQ8 = true;
  template <int g>
  HWY_INLINE static U codes(const Byte* unit, int row) {
    return load_codes(unit + 64 * g + 4 * row);
  }
};

/// A format: codes, scales, units of a strip and bytes of its header, log2 of the bias (0: none),
/// whether there is a minimum, parts.
template <class CodesT, class ScalesT, int kStripUnitsV, int kHeaderBytesV, int kBiasShiftV,
          bool kHasMinV, int kPartsV = 1>
struct Format : CodesT {
  using Scales = ScalesT;
  static constexpr int kStripUnits = kStripUnitsV;
  static constexpr int kHeaderBytes = kHeaderBytesV;
  static constexpr int kBiasShift = CodesT::kIsQ8 && kSignedDot ? 0 : kBiasShiftV;
  static constexpr bool kHasMin = kHasMinV;
  static constexpr int kParts = kPartsV;
};

using FormatQ4_0 = Format<NibbleCodes, PairScales, 2, 64, 3, false>;
using FormatQ4_1 = Format<NibbleCodes, ScalesMin, 1, 64, 0, true>;
using FormatQ5_0 = Format<FiveBitCodes, PairScales, 2, 64, 4, false>;
using FormatQ5_1 = Format<FiveBitCodes, ScalesMin, 1, 64, 0, true>;
using FormatQ8_0 = Format<ByteCodes, PairScales, 2, 64, 7, false>;
using FormatQ4_K = Format<NibbleCodes, SubScalesMin, 8, 320, 0, true>;
using FormatQ5_K = Format<FiveBitCodes, SubScalesMin, 8, 320, 0, true>;
using FormatQ6_K = Format<SixBitCodes, SubScales, 8, 320, 5, false, 2>;

// ---- one panel, up to kTokensAtOnce tokens of a tile

/// n tokens from `first` on of a tile of n_tile: where their sums go.
struct Tokens {
  int n_tile;
  int first;
  Matrix y;              // rows of the tile
  std::int64_t column;   // first row of the panel that these lanes hold
  std::int64_t n_valid;  // rows of the panel from there on, at least 1
  bool accumulate;
};

HWY_INLINE void put(const Tokens& to, int token, F sum) {
  float* out = to.y.row(to.first + token) + to.column;
  if (to.n_valid >= kRows) {
    store(to.accumulate ? add(load(out), sum) : sum, out);
    return;
  }
  float lanes[kRows];
  store(sum, lanes);
  for (std::int64_t i = 0; i < to.n_valid; ++i) {
    out[i] = to.accumulate ? out[i] + lanes[i] : lanes[i];
  }
}

// How far ahead of its use a panel's memory is asked for: the hardware's prefetcher stops at each
// 4 KiB.
constexpr std::uintptr_t kAhead = 2048;

template <int bytes>
HWY_INLINE void prefetch_lines(const Byte* p) {
#pragma GCC unroll 16
  for (int i = 0; i < bytes; i += 64) prefetch(p, kAhead + static_cast<std::uintptr_t>(i));
}

template <class Format, int n, int... g>
HWY_INLINE void add_groups(const Byte* unit, int row, const std::int8_t* high,
                           const std::int8_t* low, I (&high_sum)[n], I (&low_sum)[n],
                           std::integer_sequence<int, g...>) {
  const auto one = [&]<int group>(std::integral_constant<int, group>) MOESAIC_PANEL_LAMBDA {
    const U codes = Format::template codes<group>(unit, row);
#pragma GCC unroll 8
    for (int t = 0; t < n; ++t) {
      if constexpr (Format::kIsQ8) {
        high_sum[t] = dot_q8(high_sum[t], codes, high + 32 * t + 4 * group);
        low_sum[t] = dot_q8(low_sum[t], codes, low + 32 * t + 4 * group);
      } else {
        high_sum[t] = dot(high_sum[t], codes, high + 32 * t + 4 * group);
        low_sum[t] = dot(low_sum[t], codes, low + 32 * t + 4 * group);
      }
    }
  };
  (one(std::integral_constant<int, g>{}), ...);
}

template <int base, int... g>
constexpr std::integer_sequence<int, (base + g)...> shifted(std::integer_sequence<int, g...>) {
  return {};
}

template <class Format, int n, int part>
HWY_INLINE void add_part(const typename Format::Scales& scales, const Byte* unit, int row,
                         const std::int8_t* high, const std::int8_t* low, const float* d,
                         const std::int32_t* minus_sums, int n_tile, F (&total)[n]) {
  static constexpr std::int32_t kZero = 0;
  I high_sum[n], low_sum[n];
#pragma GCC unroll 8
  for (int t = 0; t < n; ++t) {
    high_sum[t] = low_sum[t] = broadcast(&kZero);
    if constexpr (Format::kBiasShift != 0) {
      std::int32_t minus = minus_sums[n_tile * part + t];
      if constexpr (Format::kParts == 1) minus += minus_sums[n_tile + t];
      low_sum[t] = shift_left<Format::kBiasShift>(broadcast(&minus));
    }
  }
  constexpr int kGroups = 8 / Format::kParts;
  add_groups<Format, n>(unit, row, high, low, high_sum, low_sum,
                        shifted<part * kGroups>(std::make_integer_sequence<int, kGroups>{}));
  const F scale = scales.d(part);
#pragma GCC unroll 8
  for (int t = 0; t < n; ++t) {
    const F sum = to_float(add(shift_left<7>(high_sum[t]), low_sum[t]));
    total[t] = mul_add(sum, mul(scale, broadcast(d + t)), total[t]);
  }
}

template <class Format, int n>
HWY_NOINLINE void int16_tokens(const Byte* panel, std::int64_t n_units, int row, const Byte* tile,
                               const Tokens& to) {
  F total[n];
#pragma GCC unroll 8
  for (int t = 0; t < n; ++t) total[t] = zero();
  for (std::int64_t left = n_units; left > 0; left -= Format::kStripUnits) {
    const Byte* header = panel;
    if (row == 0) prefetch_lines<Format::kHeaderBytes>(panel);
    panel += Format::kHeaderBytes;
    for (int i = 0; i < Format::kStripUnits && i < left; ++i) {
      if (row == 0) prefetch_lines<Format::kUnitBytes>(panel);
      const auto* high = reinterpret_cast<const std::int8_t*>(tile) + 32 * to.first;
      const auto* low = high + 32 * to.n_tile;
      const auto* d = reinterpret_cast<const float*>(tile + 64 * to.n_tile) + to.first;
      const float* d_sum = d + to.n_tile;
      const auto* minus_sums = reinterpret_cast<const std::int32_t*>(d_sum + to.n_tile);
      const typename Format::Scales scales(header, i, row);
      add_part<Format, n, 0>(scales, panel, row, high, low, d, minus_sums, to.n_tile, total);
      if constexpr (Format::kParts == 2) {
        add_part<Format, n, 1>(scales, panel, row, high, low, d, minus_sums, to.n_tile, total);
      }
      if constexpr (Format::kHasMin) {
        const F minimum = scales.m();
#pragma GCC unroll 8
        for (int t = 0; t < n; ++t) total[t] = mul_add(minimum, broadcast(d_sum + t), total[t]);
      }
      panel += Format::kUnitBytes;
      tile += kInt16TokenBytes * to.n_tile;
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < n; ++t) put(to, t, total[t]);
}

struct FormatBF16 {};

template <class, int n>
HWY_NOINLINE void bf16_tokens(const Byte* panel, std::int64_t n_units, int row, const Byte* tile,
                              const Tokens& to) {
  // Two sums, because one would wait for itself.
  F even[n], odd[n];
#pragma GCC unroll 8
  for (int t = 0; t < n; ++t) even[t] = odd[t] = zero();
  for (std::int64_t u = 0; u < n_units; ++u) {
    const auto* x = reinterpret_cast<const std::uint16_t*>(tile) + 32 * to.first;
#pragma GCC unroll 8
    for (int g = 0; g < 16; g += 2) {
      if (row == 0) prefetch_lines<128>(panel + 64 * g);
      const U w0 = load_codes(panel + 64 * g + 4 * row);
      const U w1 = load_codes(panel + 64 * g + 64 + 4 * row);
#pragma GCC unroll 8
      for (int t = 0; t < n; ++t) {
        even[t] = dot_bf16(even[t], w0, x + 32 * t + 2 * g);
        odd[t] = dot_bf16(odd[t], w1, x + 32 * t + 2 * g + 2);
      }
    }
    panel += 1024;
    tile += 64 * to.n_tile;
  }
#pragma GCC unroll 8
  for (int t = 0; t < n; ++t) put(to, t, add(even[t], odd[t]));
}

// ---- all panels and tokens

template <class Format, int n>
HWY_INLINE void some_tokens(const Byte* panel, std::int64_t n_units, int row, const Byte* tile,
                            const Tokens& to) {
  if constexpr (std::is_same_v<Format, FormatBF16>) {
    bf16_tokens<Format, n>(panel, n_units, row, tile, to);
  } else {
    int16_tokens<Format, n>(panel, n_units, row, tile, to);
  }
}

template <class Format>
HWY_INLINE void any_tokens(int n, const Byte* panel, std::int64_t n_units, int row,
                           const Byte* tile, const Tokens& to) {
  switch (n) {
    case 1:
      return some_tokens<Format, 1>(panel, n_units, row, tile, to);
    case 2:
      return some_tokens<Format, 2>(panel, n_units, row, tile, to);
    case 3:
      return some_tokens<Format, 3>(panel, n_units, row, tile, to);
    case 4:
      return some_tokens<Format, 4>(panel, n_units, row, tile, to);
    default:
      break;
  }
  if constexpr (kTokensAtOnce == 8) {
    switch (n) {
      case 5:
        return some_tokens<Format, 5>(panel, n_units, row, tile, to);
      case 6:
        return some_tokens<Format, 6>(panel, n_units, row, tile, to);
      case 7:
        return some_tokens<Format, 7>(panel, n_units, row, tile, to);
      case 8:
        return some_tokens<Format, 8>(panel, n_units, row, tile, to);
      default:
        break;
    }
  }
}

// Tokens whose tiles stay in the second-level cache while the panels pass.
constexpr std::int64_t kTileBytes = 512 * 1024;

template <class Format>
void multiply_format(const PanelProduct& p) {
  const PanelLayout layout = panel_layout(p.dtype, p.cols);
  const auto* panels = reinterpret_cast<const Byte*>(p.panels);
  const auto* tiles = reinterpret_cast<const Byte*>(p.tiles);
  const std::int64_t token_bytes = tile_token_bytes(tile_kind(p.dtype), p.cols);
  const std::int64_t chunk =
      std::max<std::int64_t>(kTileBytes / token_bytes / kTileTokens, 1) * kTileTokens;
  for (std::int64_t first = 0; first < p.n_tokens; first += chunk) {
    const std::int64_t end = std::min(first + chunk, p.n_tokens);
    for (std::int64_t i = p.range.begin; i < p.range.end; ++i) {
      const Byte* panel = panels + i * layout.panel_bytes();
      for (std::int64_t t = first; t < end; t += kTileTokens) {
        const auto n_tile = static_cast<int>(std::min(kTileTokens, end - t));
        const Byte* tile = tiles + t * token_bytes;
        Tokens to{.n_tile = n_tile,
                  .first = 0,
                  .y = p.y.slice(t, n_tile),
                  .column = 0,
                  .n_valid = 0,
                  .accumulate = p.accumulate};
        for (to.first = 0; to.first < n_tile; to.first += kTokensAtOnce) {
          const int n = std::min(kTokensAtOnce, n_tile - to.first);
          for (int row = 0; row < kPanelRows; row += kRows) {
            to.column = i * kPanelRows + row;
            to.n_valid = p.rows - to.column;
            if (to.n_valid > 0) any_tokens<Format>(n, panel, layout.n_units, row, tile, to);
          }
        }
      }
    }
  }
}

void multiply(const PanelProduct& p) {
#if HWY_TARGET == HWY_AVX3 && (HWY_TARGETS & HWY_AVX2)
  static const bool has_vnni = __builtin_cpu_supports("avx512vnni") != 0;
  static const bool has_bf16 = __builtin_cpu_supports("avx512bf16") != 0;
  if (p.dtype == DType::BF16 ? !has_bf16 : !has_vnni) return N_AVX2::multiply(p);
#elif HWY_TARGET == HWY_AVX3 && !(defined(__AVX512VNNI__) && defined(__AVX512BF16__))
#error "a build for AVX-512 alone must be for a machine with VNNI and bfloat16"
#endif
  switch (p.dtype) {
    case DType::BF16:
      return multiply_format<FormatBF16>(p);
    case DType::Q4_0:
      return multiply_format<FormatQ4_0>(p);
    case DType::Q4_1:
      return multiply_format<FormatQ4_1>(p);
    case DType::Q5_0:
      return multiply_format<FormatQ5_0>(p);
    case DType::Q5_1:
      return multiply_format<FormatQ5_1>(p);
    case DType::Q8_0:
      return multiply_format<FormatQ8_0>(p);
    case DType::Q4_K:
      return multiply_format<FormatQ4_K>(p);
    case DType::Q5_K:
      return multiply_format<FormatQ5_K>(p);
    case DType::Q6_K:
      return multiply_format<FormatQ6_K>(p);
    default:
      return;  // no panels
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
#ifdef MOESAIC_PANEL_TARGET
HWY_POP_ATTRIBUTES
#else
HWY_AFTER_NAMESPACE();
#endif

HWY_BEFORE_NAMESPACE();
namespace moesaic::kernels {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

/// One unit of one token: digits to high and low, the rest to places n_tile apart.
void quantize_unit(const float* x, std::int8_t* high, std::int8_t* low, float* d, float* d_sum,
                   std::int32_t* minus_sums, int n_tile) {
  constexpr float kMax = 127 * 128;
  const hn::CappedTag<float, 16> df;
  const hn::RebindToSigned<decltype(df)> di;
  const hn::Rebind<std::int8_t, decltype(df)> d8;
  constexpr std::size_t kLanes = hn::MaxLanes(df);
  auto largest = hn::Zero(df);
  auto finite = hn::Eq(largest, largest);
  for (std::size_t i = 0; i < 32; i += kLanes) {
    const auto v = hn::LoadU(df, x + i);
    // v − v is 0 unless v is NaN or infinite.
    finite = hn::And(finite, hn::Eq(hn::Sub(v, v), hn::Zero(df)));
    largest = hn::Max(largest, hn::Abs(v));
  }
  const bool is_finite = hn::AllTrue(df, finite);
  const float max = hn::GetLane(hn::MaxOfLanes(df, largest));
  // Below this the inverse is no longer finite; such a unit counts as zero.
  const bool is_zero = !is_finite || max < 1e-34f;
  *d = is_finite ? (is_zero ? 0.0f : max / kMax) : std::numeric_limits<float>::quiet_NaN();
  const auto inverse = hn::Set(df, is_zero ? 0.0f : kMax / max);
  std::int32_t total = 0;
  for (std::size_t half = 0; half < 2; ++half) {
    auto sum = hn::Zero(di);
    for (std::size_t i = 16 * half; i < 16 * half + 16; i += kLanes) {
      const auto scaled = hn::Mul(hn::LoadU(df, x + i), inverse);
      const auto code = is_zero ? hn::Zero(di) : hn::NearestInt(scaled);
      const auto upper = hn::ShiftRight<7>(hn::Add(code, hn::Set(di, 64)));
      sum = hn::Add(sum, code);
      hn::StoreU(hn::DemoteTo(d8, upper), d8, high + i);
      hn::StoreU(hn::DemoteTo(d8, hn::Sub(code, hn::ShiftLeft<7>(upper))), d8, low + i);
    }
    const std::int32_t half_sum = hn::GetLane(hn::SumOfLanes(di, sum));
    minus_sums[static_cast<std::size_t>(n_tile) * half] = -half_sum;
    total += half_sum;
  }
  *d_sum = *d * static_cast<float>(total);
}

void int16_tile(ConstMatrix x, std::byte* tile) {
  const auto n = static_cast<int>(x.rows);
  for (std::int64_t c = 0; c < x.cols; c += kUnitColumns, tile += kInt16TokenBytes * n) {
    auto* high = reinterpret_cast<std::int8_t*>(tile);
    auto* d = reinterpret_cast<float*>(tile + 64 * n);
    auto* minus_sums = reinterpret_cast<std::int32_t*>(tile + 72 * n);
    for (int t = 0; t < n; ++t) {
      quantize_unit(x.row(t) + c, high + 32 * t, high + 32 * (n + t), d + t, d + n + t,
                    minus_sums + t, n);
    }
  }
}

void int16_vector(const float* x, std::int64_t cols, std::int8_t* high, std::int8_t* low, float* d,
                  float* d_sum) {
  std::int32_t minus_sums[2];
  for (std::int64_t u = 0; u < cols / kUnitColumns; ++u) {
    const std::int64_t c = u * kUnitColumns;
    quantize_unit(x + c, high + c, low + c, d + u, d_sum + u, minus_sums, 1);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moesaic::kernels {

HWY_EXPORT(multiply);
HWY_EXPORT(int16_tile);
HWY_EXPORT(int16_vector);

void make_tile(TileKind kind, ConstMatrix x, std::byte* tile) {
  if (kind == TileKind::Int16) {
    HWY_DYNAMIC_DISPATCH(int16_tile)(x, tile);
    return;
  }
  for (std::int64_t c = 0; c < x.cols; c += kUnitColumns) {
    for (std::int64_t t = 0; t < x.rows; ++t, tile += 64) {
      to_bf16_bits(x.row(t) + c, kUnitColumns, reinterpret_cast<std::uint16_t*>(tile));
    }
  }
}

void quantize_vector(const float* x, std::int64_t cols, std::int8_t* high, std::int8_t* low,
                     float* d, float* d_sum) {
  HWY_DYNAMIC_DISPATCH(int16_vector)(x, cols, high, low, d, d_sum);
}

void multiply_panels(const PanelProduct& product) { HWY_DYNAMIC_DISPATCH(multiply)(product); }

}  // namespace moesaic::kernels
#endif  // HWY_ONCE
