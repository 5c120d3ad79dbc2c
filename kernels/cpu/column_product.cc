#include "kernels/cpu/column_product.h"

#include <algorithm>

#include "kernels/columns.h"
#include "kernels/cpu/onednn.h"
#include "kernels/cpu/panel_product.h"
#include "kernels/cpu/vnni-inl.h"

namespace moesaic::kernels {

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,f16c,fma")
namespace {

// What of one unit a product reads: its columns that count, and their numbers.
struct Unit {
  const Byte* scales;
  const Byte* codes;
  std::int64_t count;
  const std::uint8_t* ids;
  const std::int8_t* high;
  const std::int8_t* low;
  const std::uint16_t* bf16;
  float d;
  float d_sum;
  std::int32_t minus_sum;
};

Unit unit_at(const ColumnProduct& p, const ColumnLayout& layout, const ColumnInput& x,
             std::int64_t u) {
  const Byte* at = reinterpret_cast<const Byte*>(p.columns) + u * layout.unit_bytes();
  Unit unit{.scales = at,
            .codes = at + layout.scale_bytes,
            .count = x.count[u],
            .ids = x.ids + 32 * u,
            .high = nullptr,
            .low = nullptr,
            .bf16 = nullptr,
            .d = 0,
            .d_sum = 0,
            .minus_sum = 0};
  if (x.bf16 != nullptr) {
    unit.bf16 = x.bf16 + 32 * u;
  } else {
    unit.high = x.high + 32 * u;
    unit.low = x.low + 32 * u;
    unit.d = x.d[u];
    unit.d_sum = x.d_sum[u];
    unit.minus_sum = x.minus_sum[u];
  }
  return unit;
}

/// Fetches what rows [row, row + n) of a unit will read, into the second-level cache.
template <class Format, int n>
[[gnu::always_inline]] inline void fetch(const Unit& unit, const ColumnLayout& layout,
                                         std::int64_t rows, std::int64_t row) {
  constexpr int kBytes = n * Format::kBits / 8;
  const Byte* codes = unit.codes + row * Format::kBits / 8;
  for (std::int64_t j = 0; j < unit.count; ++j) {
    const Byte* p = codes + unit.ids[j] * layout.column_bytes;
    for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(p + i, 0, 2);
  }
  if (Format::kBits == 16 || unit.count == 0) return;
  for (int i = 0; i < 2 * n; i += 64) {
    __builtin_prefetch(unit.scales + 2 * row + i, 0, 2);
    if (Format::kHasMin) __builtin_prefetch(unit.scales + 2 * (rows + row) + i, 0, 2);
  }
}

/// y[row, row + n) += the unit's columns times their integers. A half is what one nibble of the
/// bytes holds; Q8_0 has one half.
template <class Format, int n>
[[gnu::always_inline]] inline void add_unit(const Unit& unit, const ColumnLayout& layout,
                                            std::int64_t rows, std::int64_t row, float* y) {
  constexpr int kHalves = Format::kBits == 8 ? 1 : 2;
  constexpr int kHalf = n / kHalves;  // rows
  constexpr int kWidth = kHalf / 4;   // rows of a part: all 16 lanes, or 8
  constexpr int kBiasShift = Format::kBias == 0 ? 0 : Format::kBias == 8 ? 3 : 7;
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i high[kHalves][4], low[kHalves][4];
  const __m512i bias =
      _mm512_set1_epi32(Format::kBias == 0 ? 0 : unit.minus_sum * (1 << kBiasShift));
#pragma GCC unroll 2
  for (int s = 0; s < kHalves; ++s) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      high[s][i] = _mm512_setzero_si512();
      low[s][i] = bias;
    }
  }
  const Byte* codes = unit.codes + row * Format::kBits / 8;
  for (std::int64_t j = 0; j < unit.count; j += 4) {
    __m512i columns[4];
#pragma GCC unroll 4
    for (int e = 0; e < 4; ++e) {
      const Byte* p = codes + unit.ids[j + e] * layout.column_bytes;
      columns[e] =
          kWidth == 16
              ? load(p)
              : _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    __m512i part[4];
    four_rows(columns[0], columns[1], columns[2], columns[3], part);
    std::int32_t four_high, four_low;
    __builtin_memcpy(&four_high, unit.high + j, 4);
    __builtin_memcpy(&four_low, unit.low + j, 4);
    const __m512i x_high = _mm512_set1_epi32(four_high), x_low = _mm512_set1_epi32(four_low);
#pragma GCC unroll 2
    for (int s = 0; s < kHalves; ++s) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        __m512i w = part[i];
        if constexpr (Format::kBits == 4) {
          w = _mm512_and_si512(s == 0 ? w : _mm512_srli_epi16(w, 4), nibble);
        }
        high[s][i] = _mm512_dpbusd_epi32(high[s][i], w, x_high);
        low[s][i] = _mm512_dpbusd_epi32(low[s][i], w, x_low);
      }
    }
  }
  const __mmask16 lanes = first_lanes(kWidth);
  const __m512 d = _mm512_set1_ps(unit.d), d_sum = _mm512_set1_ps(unit.d_sum);
#pragma GCC unroll 2
  for (int s = 0; s < kHalves; ++s) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const std::int64_t r = row + s * kHalf + i * kWidth;
      const __m512 scale = _mm512_mul_ps(load_halves(lanes, unit.scales + 2 * r), d);
      __m512 sum = _mm512_fmadd_ps(join_digits(high[s][i], low[s][i]), scale,
                                   _mm512_maskz_loadu_ps(lanes, y + r));
      if constexpr (Format::kHasMin) {
        sum = _mm512_fmadd_ps(load_halves(lanes, unit.scales + 2 * (rows + r)), d_sum, sum);
      }
      _mm512_mask_storeu_ps(y + r, lanes, sum);
    }
  }
}

/// The same in bfloat16 for n = 128, 64 or 32 rows.
template <int n>
[[gnu::always_inline]] inline void add_bf16_unit(const Unit& unit, const ColumnLayout& layout,
                                                 std::int64_t row, float* y) {
  constexpr int kVectors = n / 32;
  __m512 sum[2 * kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < 2 * kVectors; ++i) sum[i] = _mm512_loadu_ps(y + row + 16 * i);
  const Byte* codes = unit.codes + 2 * row;
  for (std::int64_t j = 0; j < unit.count; j += 2) {
    const Byte* a = codes + unit.ids[j] * layout.column_bytes;
    const Byte* b = codes + unit.ids[j + 1] * layout.column_bytes;
    std::int32_t two;
    __builtin_memcpy(&two, unit.bf16 + j, 4);
    const auto x = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const __m512i w_a = load(a + 64 * i), w_b = load(b + 64 * i);
      sum[2 * i] = _mm512_dpbf16_ps(sum[2 * i], (__m512bh)_mm512_unpacklo_epi16(w_a, w_b), x);
      sum[2 * i + 1] =
          _mm512_dpbf16_ps(sum[2 * i + 1], (__m512bh)_mm512_unpackhi_epi16(w_a, w_b), x);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < 2 * kVectors; ++i) _mm512_storeu_ps(y + row + 16 * i, sum[i]);
}

template <class Format, int n>
[[gnu::always_inline]] inline void add_rows(const Unit& unit, const Unit& next,
                                            const ColumnLayout& layout, std::int64_t rows,
                                            std::int64_t row, float* y) {
  fetch<Format, n>(next, layout, rows, row);
  if constexpr (Format::kBits == 16) {
    add_bf16_unit<n>(unit, layout, row, y);
  } else {
    add_unit<Format, n>(unit, layout, rows, row, y);
  }
}

// Units between a unit's fetching and its use. Two and three ahead, and whole columns before the
// next one instead of 128 rows of each, were no faster: what limits is how many lines a core asks
// for at once (see byte_cost() in self_routed_sparse.cc).
constexpr int kUnitsAhead = 1;

template <class Format>
std::int64_t multiply_columns_of(const ColumnProduct& p, const ColumnInput& x) {
  constexpr int kRows = Format::kBits == 8 ? 64 : 128;  // at once
  const ColumnLayout layout = column_layout(p.dtype, p.rows);
  std::fill(p.y + p.range.begin, p.y + p.range.end, 0.0f);
  std::int64_t n_units = 0, n_columns = 0;
  // The units with columns that count, kUnitsAhead of them fetched before their turn.
  std::int64_t after = 0;
  const auto next = [&] {
    while (after < x.n_units && x.count[after] == 0) ++after;
    return after < x.n_units ? unit_at(p, layout, x, after++) : Unit{};
  };
  Unit units[kUnitsAhead + 1];
  for (int i = 0; i < kUnitsAhead; ++i) {
    units[i] = next();
    for (std::int64_t row = p.range.begin; row < p.range.end; row += kRows) {
      fetch<Format, kRows>(units[i], layout, p.rows, row);
    }
  }
  while (units[0].count > 0) {
    const Unit& unit = units[0];
    const Unit& soon = units[kUnitsAhead] = next();
    std::int64_t row = p.range.begin;
    for (; row + kRows <= p.range.end; row += kRows) {
      add_rows<Format, kRows>(unit, soon, layout, p.rows, row, p.y);
    }
    if (kRows == 128 && row < p.range.end) {
      add_rows<Format, 64>(unit, soon, layout, p.rows, row, p.y);
    }
    ++n_units;
    n_columns += unit.count;
    std::copy(units + 1, units + kUnitsAhead + 1, units);
  }
  return p.range.size() * (n_units * layout.scale_bytes + n_columns * layout.column_bytes) / p.rows;
}

// What is marked of 16 words, moved together, as bytes; `kept` has as many lanes.
void put_bytes(void* to, __mmask16 marked, __mmask16 kept, __m512i words) {
  _mm_mask_storeu_epi8(to, kept, _mm512_cvtepi32_epi8(_mm512_maskz_compress_epi32(marked, words)));
}

__m512i widen(const std::int8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

std::int32_t sum_bytes(const std::int8_t* p) {
  const __m256i ones = _mm256_set1_epi8(1);
  const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), ones,
                                           _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_reduce_add_epi32(_mm512_zextsi256_si512(sums));
}

// The lists of unit u. high and low, or bf16, are the unit's numbers in order.
void list_unit(std::uint32_t marks, std::int64_t u, const std::int8_t* high, const std::int8_t* low,
               const std::uint16_t* bf16, const ColumnInput& to) {
  to.count[u] = static_cast<std::uint8_t>(__builtin_popcount(marks));
  if (marks == 0) return;
  std::uint8_t* ids = to.ids + 32 * u;
  // What fills the list up.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(ids),
                      _mm256_set1_epi8(static_cast<char>(__builtin_ctz(marks))));
  if (bf16 != nullptr) {
    _mm512_storeu_si512(to.bf16 + 32 * u, _mm512_setzero_si512());
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.high + 32 * u), _mm256_setzero_si256());
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.low + 32 * u), _mm256_setzero_si256());
  }
  __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  std::int64_t at = 0;
  for (std::int64_t first = 0; first < 32; first += 16) {
    const auto marked = static_cast<__mmask16>(marks >> first);
    const int n = __builtin_popcount(marked);
    const __mmask16 kept = first_lanes(n);
    put_bytes(ids + at, marked, kept, numbers);
    numbers = _mm512_add_epi32(numbers, _mm512_set1_epi32(16));
    if (bf16 != nullptr) {
      const __m512i words =
          _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16 + first)));
      _mm256_mask_storeu_epi16(to.bf16 + 32 * u + at, kept,
                               _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(marked, words)));
    } else {
      put_bytes(to.high + 32 * u + at, marked, kept, widen(high + first));
      put_bytes(to.low + 32 * u + at, marked, kept, widen(low + first));
    }
    at += n;
  }
  if (bf16 == nullptr) {
    to.minus_sum[u] = -(128 * sum_bytes(to.high + 32 * u) + sum_bytes(to.low + 32 * u));
  }
}

void list_units(const std::uint32_t* marks, const std::int8_t* high, const std::int8_t* low,
                const std::uint16_t* bf16, const ColumnInput& to) {
  for (std::int64_t u = 0; u < to.n_units; ++u) {
    if (bf16 != nullptr) {
      list_unit(marks[u], u, nullptr, nullptr, bf16 + 32 * u, to);
    } else {
      list_unit(marks[u], u, high + 32 * u, low + 32 * u, nullptr, to);
    }
  }
}

std::int64_t list_words(const std::uint32_t* marks, std::int64_t n, std::int32_t* ids) {
  __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  std::int64_t count = 0;
  for (std::int64_t first = 0; first < n; first += 16) {
    const auto marked = static_cast<__mmask16>(marks[first / 32] >> (first % 32));
    _mm512_storeu_si512(ids + count, _mm512_maskz_compress_epi32(marked, numbers));
    count += __builtin_popcount(marked);
    numbers = _mm512_add_epi32(numbers, _mm512_set1_epi32(16));
  }
  return count;
}

}  // namespace
#pragma GCC pop_options

ColumnInput make_column_input(DType dtype, const float* x, const std::uint32_t* marks,
                              std::int64_t cols, std::byte* scratch) {
  // Piece by piece at multiples of 64 bytes.
  const auto take = [&](std::int64_t bytes) {
    std::byte* p = scratch;
    scratch += (bytes + 63) / 64 * 64;
    return p;
  };
  const std::int64_t n_units = cols / 32;
  ColumnInput input{.n_units = n_units,
                    .count = reinterpret_cast<std::uint8_t*>(take(n_units)),
                    .ids = reinterpret_cast<std::uint8_t*>(take(cols))};
  if (dtype == DType::BF16) {
    input.bf16 = reinterpret_cast<std::uint16_t*>(take(2 * cols));
    auto* in_order = reinterpret_cast<std::uint16_t*>(take(2 * cols));
    to_bf16_bits(x, static_cast<std::size_t>(cols), in_order);
    list_units(marks, nullptr, nullptr, in_order, input);
    return input;
  }
  input.high = reinterpret_cast<std::int8_t*>(take(cols));
  input.low = reinterpret_cast<std::int8_t*>(take(cols));
  input.d = reinterpret_cast<float*>(take(4 * n_units));
  input.d_sum = reinterpret_cast<float*>(take(4 * n_units));
  input.minus_sum = reinterpret_cast<std::int32_t*>(take(4 * n_units));
  auto* high = reinterpret_cast<std::int8_t*>(take(cols));
  auto* low = reinterpret_cast<std::int8_t*>(take(cols));
  quantize_vector(x, cols, high, low, input.d, input.d_sum);
  list_units(marks, high, low, nullptr, input);
  return input;
}

std::int64_t multiply_columns(const ColumnProduct& product, const ColumnInput& x) {
  switch (product.dtype) {
    case DType::Q4_0:
      return multiply_columns_of<FormatQ4_0>(product, x);
    case DType::Q4_1:
      return multiply_columns_of<FormatQ4_1>(product, x);
    case DType::Q8_0:
      return multiply_columns_of<FormatQ8_0>(product, x);
    case DType::BF16:
      return multiply_columns_of<FormatBF16>(product, x);
    default:
      return 0;  // has_columns() says no
  }
}

std::int64_t list_marked(const std::uint32_t* marks, std::int64_t n, std::int32_t* ids) {
  return list_words(marks, n, ids);
}
#else
ColumnInput make_column_input(DType, const float*, const std::uint32_t*, std::int64_t, std::byte*) {
  return {};  // has_columns() says no, here and below
}
std::int64_t multiply_columns(const ColumnProduct&, const ColumnInput&) { return 0; }
std::int64_t list_marked(const std::uint32_t*, std::int64_t, std::int32_t*) { return 0; }
#endif

}  // namespace moesaic::kernels
