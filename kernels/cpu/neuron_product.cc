#include "kernels/cpu/neuron_product.h"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/onednn.h"
#include "kernels/cpu/panel_product.h"
#include "kernels/cpu/vnni-inl.h"
#include "kernels/neurons.h"

namespace moesaic::kernels {

namespace {

constexpr std::int64_t kBatch = 16;  // neurons whose activations are held at once
// Neurons between a neuron's fetching and its use, into the second-level cache. d_model 576, Q4_1,
// 128 shared and 256 of 1,408 neurons, one (two) threads of a Zen 4, µs per layer: 82 (59) six
// ahead into the first level, 47 (29) six ahead into the second, 43 (24) ten, 45 (36) sixteen.
constexpr std::int64_t kAhead = 10;

// always_inline, because GCC takes a call that only prefetches for one without effect.
[[gnu::always_inline]] inline void fetch(const PackedNeurons& list, std::int64_t neuron_bytes,
                                         std::int64_t j) {
  if (j >= list.count) return;
  const std::byte* p = list.data + list.id(j) * neuron_bytes;
  for (std::int64_t i = 0; i < neuron_bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// Sixteen units of 32 one after the other into eight groups of [16 units][4].
void interleave(std::int8_t* digits) {
  std::int8_t units[512];
  std::memcpy(units, digits, sizeof(units));
  for (int u = 0; u < 16; ++u) {
    for (int g = 0; g < 8; ++g) std::memcpy(digits + 64 * g + 4 * u, units + 32 * u + 4 * g, 4);
  }
}

}  // namespace

NeuronInput make_neuron_input(DType dtype, const float* x, std::int64_t cols, std::byte* scratch) {
  NeuronInput input;
  if (dtype == DType::BF16) {
    input.bf16 = reinterpret_cast<std::uint16_t*>(scratch);
    to_bf16_bits(x, static_cast<std::size_t>(cols), input.bf16);
    return input;
  }
  input.high = reinterpret_cast<std::int8_t*>(scratch);
  input.low = input.high + cols;
  input.d = reinterpret_cast<float*>(scratch + 2 * cols);
  input.d_sum = input.d + cols / 32;
  quantize_vector(x, cols, input.high, input.low, input.d, input.d_sum);
  for (std::int64_t first = 0; first + 512 <= cols; first += 512) {
    interleave(input.high + first);
    interleave(input.low + first);
  }
  return input;
}

void packed_neurons_soon(const PackedNeurons& list) {
  const std::int64_t bytes = neuron_layout(list.dtype, list.cols).neuron_bytes();
  for (std::int64_t j = 0; j < kAhead; ++j) fetch(list, bytes, j);
}

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,f16c,fma")
namespace {

/// sum + scales · (codes · x) for 64 columns in order: two units, eight lanes each. `scales` holds
/// d of x times d of w for 16 units, `which` the lanes of these two.
[[gnu::always_inline]] inline __m512 add_codes(__m512 sum, __m512i codes, const NeuronInput& x,
                                               std::int64_t column, __m512 scales, __m512i which) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i high = _mm512_dpbusd_epi32(zero, codes, load(x.high + column));
  const __m512i low = _mm512_dpbusd_epi32(zero, codes, load(x.low + column));
  return _mm512_fmadd_ps(join_digits(high, low), _mm512_permutexvar_ps(which, scales), sum);
}

/// Lanes whose sum is w · x of a gate or up row in 4-bit codes (kBits 4) or bytes (8), which are
/// too high by kBias.
template <int kBits, bool kHasMin, int kBias>
[[gnu::always_inline]] inline __m512 dot_row(const Byte* row, std::int64_t cols,
                                             const NeuronInput& x) {
  const std::int64_t n_units = cols / 32;
  const Byte* codes = row + (kHasMin ? 4 : 2) * n_units;
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512 sum = _mm512_setzero_ps();
  __m512 rest = _mm512_setzero_ps();  // what minima or bias add, in units
  for (std::int64_t first = 0; first < n_units; first += 16) {
    const std::int64_t n = std::min<std::int64_t>(16, n_units - first);
    const __mmask16 lanes = first_lanes(n);
    const __m512 d = load_halves(lanes, row + 2 * first);
    const __m512 x_sum = _mm512_maskz_loadu_ps(lanes, x.d_sum + first);
    const __m512 scales = _mm512_mul_ps(d, _mm512_maskz_loadu_ps(lanes, x.d + first));
    if constexpr (kHasMin) {
      rest = _mm512_fmadd_ps(load_halves(lanes, row + 2 * (n_units + first)), x_sum, rest);
    } else {
      rest = _mm512_fmadd_ps(d, x_sum, rest);
    }
    std::int64_t column = 32 * first;
    if (n == 16) {
      // A lane is a unit.
      __m512i high = _mm512_setzero_si512(), low = high;
      const auto add = [&](__m512i w, int g) __attribute__((always_inline)) {
        high = _mm512_dpbusd_epi32(high, w, load(x.high + column + 64 * g));
        low = _mm512_dpbusd_epi32(low, w, load(x.low + column + 64 * g));
      };
      if constexpr (kBits == 8) {
#pragma GCC unroll 8
        for (int g = 0; g < 8; ++g) add(load(codes + column + 64 * g), g);
      } else {
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
          const __m512i packed = load(codes + column / 2 + 64 * g);
          add(_mm512_and_si512(packed, nibble), g);
          add(_mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble), g + 4);
        }
      }
      sum = _mm512_fmadd_ps(join_digits(high, low), scales, sum);
      continue;
    }
    __m512i which = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i two = _mm512_set1_epi32(2);
    const std::int64_t end = 32 * (first + n);
    if constexpr (kBits == 8) {
      for (; column < end; column += 64) {
        sum = add_codes(sum, load(codes + column), x, column, scales, which);
        which = _mm512_add_epi32(which, two);
      }
      continue;
    }
    for (; column + 128 <= end; column += 128) {
      const __m512i packed = load(codes + column / 2);
      sum = add_codes(sum, _mm512_and_si512(packed, nibble), x, column, scales, which);
      which = _mm512_add_epi32(which, two);
      const __m512i upper = _mm512_and_si512(_mm512_srli_epi16(packed, 4), nibble);
      sum = add_codes(sum, upper, x, column + 64, scales, which);
      which = _mm512_add_epi32(which, two);
    }
    if (column < end) {
      const __m256i packed =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + column / 2));
      const __m512i halves =
          _mm512_inserti64x4(_mm512_castsi256_si512(packed), _mm256_srli_epi16(packed, 4), 1);
      sum = add_codes(sum, _mm512_and_si512(halves, nibble), x, column, scales, which);
    }
  }
  const __m512 correction = _mm512_set1_ps(kHasMin ? 1.0f : -static_cast<float>(kBias));
  return _mm512_fmadd_ps(rest, correction, sum);
}

[[gnu::always_inline]] inline __m512 dot_bf16_row(const Byte* row, std::int64_t cols,
                                                  const NeuronInput& x) {
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (std::int64_t c = 0; c < cols; c += 64) {
    for (std::int64_t i = 0; i < 2; ++i) {
      sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_loadu_si512(row + 2 * c + 64 * i),
                                 (__m512bh)_mm512_loadu_si512(x.bf16 + c + 32 * i));
    }
  }
  return _mm512_add_ps(sums[0], sums[1]);
}

// What the down rows of a batch are multiplied by, per unit of columns: a_j = h_j d_j as integers
// of two digits, a_j ≈ scale (128 high_j + low_j), scale = max_j |a_j| / (127 · 128). A quad holds
// one digit of four neurons.
struct Coefficients {
  std::int32_t* high;  // [kBatch / 4, n_units]
  std::int32_t* low;   // likewise
  float* scale;        // [n_units]
  float* constant;     // [n_units], what minima or bias add to every column

  Coefficients(float* scratch, std::int64_t n_units)
      : high(reinterpret_cast<std::int32_t*>(scratch)),
        low(high + kBatch / 4 * n_units),
        scale(reinterpret_cast<float*>(low + kBatch / 4 * n_units)),
        constant(scale + n_units) {}
};

/// down[j] are the rows' scales, h[j] the activations, 0 beyond the batch.
template <class Format>
[[gnu::always_inline]] inline void make_coefficients(const Byte* const* down, const float* h,
                                                     std::int64_t n_units, const Coefficients& to) {
  constexpr float kMax = 127 * 128;
  const __m512 zero = _mm512_setzero_ps();
  const __m512i byte = _mm512_set1_epi32(255);
  for (std::int64_t u = 0; u < n_units; u += 16) {
    const __mmask16 lanes = first_lanes(n_units - u);
    __m512 largest = zero;
    __m512 poison = zero;  // NaN as soon as one a is NaN or infinite
    __m512 constant = zero;
    __m512 a[kBatch];
    for (std::int64_t j = 0; j < kBatch; ++j) {
      const __m512 hj = _mm512_set1_ps(h[j]);
      a[j] = _mm512_mul_ps(hj, load_halves(lanes, down[j] + 2 * u));
      largest = _mm512_max_ps(largest, _mm512_abs_ps(a[j]));
      poison = _mm512_fmadd_ps(a[j], zero, poison);
      if constexpr (Format::kHasMin) {
        constant = _mm512_fmadd_ps(hj, load_halves(lanes, down[j] + 2 * (n_units + u)), constant);
      }
    }
    // Below this the inverse is no longer finite; such a unit counts as zero.
    const __mmask16 counts = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(1e-34f), _CMP_GE_OQ);
    const __m512 inverse = _mm512_maskz_div_ps(counts, _mm512_set1_ps(kMax), largest);
    const __m512 scale = _mm512_add_ps(_mm512_mul_ps(largest, _mm512_set1_ps(1 / kMax)), poison);
    __m512i sum = _mm512_setzero_si512();
    for (std::int64_t g = 0; g < kBatch / 4; ++g) {
      __m512i high = _mm512_setzero_si512(), low = high;
#pragma GCC unroll 4
      for (int e = 3; e >= 0; --e) {
        const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(a[4 * g + e], inverse));
        const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(64)), 7);
        const __m512i lower = _mm512_sub_epi32(q, _mm512_slli_epi32(upper, 7));
        high = _mm512_or_si512(_mm512_slli_epi32(high, 8), _mm512_and_si512(upper, byte));
        low = _mm512_or_si512(_mm512_slli_epi32(low, 8), _mm512_and_si512(lower, byte));
        sum = _mm512_add_epi32(sum, q);
      }
      _mm512_mask_storeu_epi32(to.high + g * n_units + u, lanes, high);
      _mm512_mask_storeu_epi32(to.low + g * n_units + u, lanes, low);
    }
    if constexpr (!Format::kHasMin) {
      constant = _mm512_mul_ps(_mm512_cvtepi32_ps(sum),
                               _mm512_mul_ps(scale, _mm512_set1_ps(-Format::kBias)));
    }
    _mm512_mask_storeu_ps(to.scale + u, lanes, scale);
    _mm512_mask_storeu_ps(to.constant + u, lanes, constant);
  }
}

/// y[column, column + 16) += scale · (128 high + low) + constant of the unit, of the first lanes.
[[gnu::always_inline]] inline void add_to(float* y, __mmask16 lanes, __m512i high, __m512i low,
                                          const Coefficients& c, std::int64_t unit) {
  const __m512 before =
      _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, y), _mm512_set1_ps(c.constant[unit]));
  _mm512_mask_storeu_ps(
      y, lanes, _mm512_fmadd_ps(join_digits(high, low), _mm512_set1_ps(c.scale[unit]), before));
}

/// The batch's part of columns [column, column + n), n = 128 or 64. A half is what one nibble of
/// the bytes holds; Q8_0 has one half.
template <class Format, int n>
[[gnu::always_inline]] inline void add_columns(const Byte* const* down, std::int64_t n_units,
                                               std::int64_t column, const Coefficients& c,
                                               float* y) {
  constexpr int kHalves = Format::kBits == 8 ? 1 : 2;
  constexpr int kHalf = n / kHalves;  // columns
  constexpr int kWidth = kHalf / 4;   // columns of a part: all 16 lanes, or 8
  const __m512i nibble = _mm512_set1_epi8(15);
  const std::int64_t unit = column / 32;
  __m512i high[kHalves][4], low[kHalves][4];
#pragma GCC unroll 2
  for (int s = 0; s < kHalves; ++s) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) high[s][i] = low[s][i] = _mm512_setzero_si512();
  }
  for (std::int64_t g = 0; g < kBatch / 4; ++g) {
    __m512i rows[4];
#pragma GCC unroll 4
    for (int e = 0; e < 4; ++e) {
      const Byte* p = down[4 * g + e] + column * Format::kBits / 8;
      rows[e] =
          kWidth == 16
              ? load(p)
              : _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    __m512i part[4];
    four_rows(rows[0], rows[1], rows[2], rows[3], part);
#pragma GCC unroll 2
    for (int s = 0; s < kHalves; ++s) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        __m512i codes = part[i];
        if constexpr (Format::kBits == 4) {
          codes = _mm512_and_si512(s == 0 ? codes : _mm512_srli_epi16(codes, 4), nibble);
        }
        const std::int64_t at = g * n_units + unit + (s * kHalf + i * kWidth) / 32;
        high[s][i] = _mm512_dpbusd_epi32(high[s][i], codes, _mm512_set1_epi32(c.high[at]));
        low[s][i] = _mm512_dpbusd_epi32(low[s][i], codes, _mm512_set1_epi32(c.low[at]));
      }
    }
  }
#pragma GCC unroll 2
  for (int s = 0; s < kHalves; ++s) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int first = s * kHalf + i * kWidth;
      add_to(y + column + first, first_lanes(kWidth), high[s][i], low[s][i], c, unit + first / 32);
    }
  }
}

/// y += Σ_j h_j down_j for a batch of rows that begin with their scales; h 0 beyond the batch.
template <class Format>
[[gnu::always_inline]] inline void add_down(const Byte* const* down, const float* h,
                                            const NeuronLayout& layout, std::int64_t cols, float* y,
                                            float* scratch) {
  const std::int64_t n_units = cols / 32;
  const Coefficients c(scratch, n_units);
  make_coefficients<Format>(down, h, n_units, c);
  const Byte* codes[kBatch];
  for (std::int64_t j = 0; j < kBatch; ++j) codes[j] = down[j] + layout.scale_bytes;
  constexpr int kColumns = Format::kBits == 8 ? 64 : 128;
  std::int64_t column = 0;
  for (; column + kColumns <= cols; column += kColumns) {
    add_columns<Format, kColumns>(codes, n_units, column, c, y);
  }
  if constexpr (kColumns == 128) {
    if (column < cols) add_columns<Format, 64>(codes, n_units, column, c, y);
  }
}

template <>
inline void add_down<FormatBF16>(const Byte* const* down, const float* h, const NeuronLayout&,
                                 std::int64_t cols, float* y, float*) {
  for (std::int64_t column = 0; column < cols; column += 64) {
    __m512 sum[4];
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) sum[s] = _mm512_loadu_ps(y + column + 16 * s);
    for (std::int64_t j = 0; j < kBatch; ++j) {
      const __m512 scale = _mm512_set1_ps(h[j]);
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        const __m256i half =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(down[j] + 2 * column + 32 * s));
        const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
        sum[s] = _mm512_fmadd_ps(_mm512_castsi512_ps(bits), scale, sum[s]);
      }
    }
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) _mm512_storeu_ps(y + column + 16 * s, sum[s]);
  }
}

template <class Format>
[[gnu::always_inline]] inline __m512 dot(const Byte* row, std::int64_t cols, const NeuronInput& x) {
  if constexpr (Format::kBits == 16) {
    return dot_bf16_row(row, cols, x);
  } else {
    return dot_row<Format::kBits, Format::kHasMin, Format::kBias>(row, cols, x);
  }
}

template <class Format>
void add_neurons_of(Context& ctx, const PackedNeurons& list, Activation phi, const NeuronInput& x,
                    float* y, float* scratch) {
  const NeuronLayout layout = neuron_layout(list.dtype, list.cols);
  const std::int64_t bytes = layout.neuron_bytes();
  for (std::int64_t first = 0; first < list.count; first += kBatch) {
    const std::int64_t n = std::min(kBatch, list.count - first);
    float gate[kBatch], up[kBatch];
    __m512 gate_lanes[kBatch], up_lanes[kBatch];
    float h[kBatch] = {};
    const Byte* down[kBatch];
    for (std::int64_t j = 0; j < n; ++j) {
      fetch(list, bytes, first + j + kAhead);
      const auto* row = reinterpret_cast<const Byte*>(list.data + list.id(first + j) * bytes);
      gate_lanes[j] = dot<Format>(row, list.cols, x);
      up_lanes[j] = dot<Format>(row + layout.row_bytes(), list.cols, x);
      down[j] = row + 2 * layout.row_bytes();
    }
    // Summed across together: one by one, each would wait for its row.
    for (std::int64_t j = 0; j < n; ++j) {
      gate[j] = _mm512_reduce_add_ps(gate_lanes[j]);
      up[j] = _mm512_reduce_add_ps(up_lanes[j]);
    }
    // A batch that is not full repeats its first row, times 0.
    for (std::int64_t j = n; j < kBatch; ++j) down[j] = down[0];
    // One row at a time runs on the calling thread.
    gated_activation(ctx, phi, ConstMatrix(gate, 1, n), ConstMatrix(up, 1, n), Matrix(h, 1, n));
    for (std::int64_t j = 0; j < n && list.mean != nullptr; ++j) {
      h[j] -= list.mean[list.id(first + j)];
    }
    add_down<Format>(down, h, layout, list.cols, y, scratch);
  }
}

// Rows between a row's fetching and its use: as many bytes as kAhead neurons.
constexpr std::int64_t kRowsAhead = 3 * kAhead;

[[gnu::always_inline]] inline void fetch_row(const ListedRows& list, std::int64_t bytes,
                                             std::int64_t j) {
  if (j >= list.count) return;
  const std::byte* p = list.data + list.ids[j] * bytes;
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

template <class Format>
void multiply_rows_of(const ListedRows& list, const NeuronInput& x, float* y) {
  const std::int64_t bytes = neuron_layout(list.dtype, list.cols).single_row_bytes();
  for (std::int64_t j = 0; j < kRowsAhead; ++j) fetch_row(list, bytes, j);
  for (std::int64_t first = 0; first < list.count; first += kBatch) {
    const std::int64_t n = std::min(kBatch, list.count - first);
    __m512 lanes[kBatch];
    for (std::int64_t j = 0; j < n; ++j) {
      fetch_row(list, bytes, first + j + kRowsAhead);
      const auto* row = reinterpret_cast<const Byte*>(list.data + list.ids[first + j] * bytes);
      lanes[j] = dot<Format>(row, list.cols, x);
    }
    // Summed across together: one by one, each would wait for its row.
    for (std::int64_t j = 0; j < n; ++j) y[list.ids[first + j]] = _mm512_reduce_add_ps(lanes[j]);
  }
}

}  // namespace
#pragma GCC pop_options

void multiply_rows(const ListedRows& list, const NeuronInput& x, float* y) {
  switch (list.dtype) {
    case DType::Q4_0:
      return multiply_rows_of<FormatQ4_0>(list, x, y);
    case DType::Q4_1:
      return multiply_rows_of<FormatQ4_1>(list, x, y);
    case DType::Q8_0:
      return multiply_rows_of<FormatQ8_0>(list, x, y);
    case DType::BF16:
      return multiply_rows_of<FormatBF16>(list, x, y);
    default:
      return;  // has_neurons() says no
  }
}

void add_packed_neurons(Context& ctx, const PackedNeurons& list, Activation phi,
                        const NeuronInput& x, float* y, float* scratch) {
  switch (list.dtype) {
    case DType::Q4_0:
      return add_neurons_of<FormatQ4_0>(ctx, list, phi, x, y, scratch);
    case DType::Q4_1:
      return add_neurons_of<FormatQ4_1>(ctx, list, phi, x, y, scratch);
    case DType::Q8_0:
      return add_neurons_of<FormatQ8_0>(ctx, list, phi, x, y, scratch);
    case DType::BF16:
      return add_neurons_of<FormatBF16>(ctx, list, phi, x, y, scratch);
    default:
      return;  // has_neurons() says no
  }
}
#else
void add_packed_neurons(Context&, const PackedNeurons&, Activation, const NeuronInput&, float*,
                        float*) {}  // has_neurons() says no
void multiply_rows(const ListedRows&, const NeuronInput&, float*) {}
#endif

}  // namespace moesaic::kernels
