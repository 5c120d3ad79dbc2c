#include "kernels/cpu/neuron_product.h"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/onednn.h"
#include "kernels/cpu/panel_product.h"
#include "kernels/neurons.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moesaic::kernels {

namespace {

constexpr std::int64_t kBatch = 16;  // neurons whose activations are held at once
constexpr std::int64_t kAhead = 6;   // neurons between a neuron's fetching and its use

// always_inline, because GCC takes a call that only prefetches for one without effect.
[[gnu::always_inline]] inline void fetch(const PackedNeurons& list, std::int64_t neuron_bytes,
                                         std::int64_t j) {
  if (j >= list.count) return;
  const std::byte* p = list.data + list.id(j) * neuron_bytes;
  for (std::int64_t i = 0; i < neuron_bytes; i += 64) __builtin_prefetch(p + i, 0, 3);
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

using Byte = std::uint8_t;

__mmask16 first_lanes(std::int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1);
}

[[gnu::always_inline]] inline __m512 load_halves(__mmask16 lanes, const Byte* p) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p));
}

/// sum + scales · (codes · x) for 64 columns: two units, eight lanes each. `scales` holds d of x
/// times d of w for 16 units, `which` the lanes of these two.
[[gnu::always_inline]] inline __m512 add_codes(__m512 sum, __m512i codes, const NeuronInput& x,
                                               std::int64_t column, __m512 scales, __m512i which) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i high = _mm512_dpbusd_epi32(zero, codes, _mm512_loadu_si512(x.high + column));
  const __m512i low = _mm512_dpbusd_epi32(zero, codes, _mm512_loadu_si512(x.low + column));
  const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(high, 7), low);
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), _mm512_permutexvar_ps(which, scales), sum);
}

/// w · x of a gate or up row in 4-bit codes (kBits 4) or bytes (8), which are too high by kBias.
template <int kBits, bool kHasMin, int kBias>
[[gnu::always_inline]] inline float dot_row(const Byte* row, std::int64_t cols,
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
    __m512i which = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i two = _mm512_set1_epi32(2);
    std::int64_t column = 32 * first;
    const std::int64_t end = 32 * (first + n);
    if constexpr (kBits == 8) {
      for (; column < end; column += 64) {
        sum = add_codes(sum, _mm512_loadu_si512(codes + column), x, column, scales, which);
        which = _mm512_add_epi32(which, two);
      }
      continue;
    }
    for (; column + 128 <= end; column += 128) {
      const __m512i packed = _mm512_loadu_si512(codes + column / 2);
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
  return _mm512_reduce_add_ps(_mm512_fmadd_ps(rest, correction, sum));
}

[[gnu::always_inline]] inline float dot_bf16_row(const Byte* row, std::int64_t cols,
                                                 const NeuronInput& x) {
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (std::int64_t c = 0; c < cols; c += 64) {
    for (std::int64_t i = 0; i < 2; ++i) {
      sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_loadu_si512(row + 2 * c + 64 * i),
                                 (__m512bh)_mm512_loadu_si512(x.bf16 + c + 32 * i));
    }
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

struct NeuronsQ4_0 {
  static constexpr int kBits = 4;
  static constexpr bool kHasMin = false;
  [[gnu::always_inline]] static float dot(const Byte* row, std::int64_t cols,
                                          const NeuronInput& x) {
    return dot_row<4, false, 8>(row, cols, x);
  }
  // Level i of a unit: (i − 8) d.
  [[gnu::always_inline]] static __m512 levels(const float* d, const float*) {
    const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_mul_ps(codes, _mm512_set1_ps(*d));
  }
};

struct NeuronsQ4_1 {
  static constexpr int kBits = 4;
  static constexpr bool kHasMin = true;
  [[gnu::always_inline]] static float dot(const Byte* row, std::int64_t cols,
                                          const NeuronInput& x) {
    return dot_row<4, true, 0>(row, cols, x);
  }
  // Level i: i d + m.
  [[gnu::always_inline]] static __m512 levels(const float* d, const float* m) {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_fmadd_ps(codes, _mm512_set1_ps(*d), _mm512_set1_ps(*m));
  }
};

struct NeuronsQ8_0 {
  static constexpr int kBits = 8;
  static constexpr bool kHasMin = false;
  [[gnu::always_inline]] static float dot(const Byte* row, std::int64_t cols,
                                          const NeuronInput& x) {
    return dot_row<8, false, 128>(row, cols, x);
  }
};

struct NeuronsBF16 {
  static constexpr int kBits = 16;
  static constexpr bool kHasMin = false;
  [[gnu::always_inline]] static float dot(const Byte* row, std::int64_t cols,
                                          const NeuronInput& x) {
    return dot_bf16_row(row, cols, x);
  }
};

/// Columns [column, column + kWidth) of y, held in registers while all neurons are added.
/// d, m: scales and minima of the down rows times the neurons' activations, [n, n_units].
template <class Format, int kWidth>
[[gnu::always_inline]] inline void add_columns(const Byte* const* down, std::int64_t n,
                                               std::int64_t n_units, std::int64_t column,
                                               const float* h, const float* d, const float* m,
                                               float* y) {
  constexpr int kVectors = kWidth / 16;
  __m512 sum[kVectors];
#pragma GCC unroll 8
  for (int s = 0; s < kVectors; ++s) sum[s] = _mm512_loadu_ps(y + column + 16 * s);
  for (std::int64_t j = 0; j < n; ++j) {
    const Byte* row = down[j];
    const float* dj = d + j * n_units + column / 32;
    if constexpr (Format::kBits == 4) {
      const float* mj = m + j * n_units + column / 32;
      __m512i words;
      if constexpr (kWidth == 128) {
        words = _mm512_loadu_si512(row + column / 2);
      } else {
        words = _mm512_cvtepu16_epi32(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + column / 2)));
      }
      // A lookup sees the low four bits of a lane alone.
#pragma GCC unroll 4
      for (int u = 0; u < kVectors / 2; ++u) {
        const __m512 levels = Format::levels(dj + u, mj + u);
        const __m512i low = u == 0 ? words : _mm512_srli_epi32(words, 8 * u);
        sum[2 * u] = _mm512_add_ps(sum[2 * u], _mm512_permutexvar_ps(low, levels));
        const __m512i high = _mm512_srli_epi32(words, 8 * u + 4);
        sum[2 * u + 1] = _mm512_add_ps(sum[2 * u + 1], _mm512_permutexvar_ps(high, levels));
      }
    } else if constexpr (Format::kBits == 8) {
#pragma GCC unroll 8
      for (int s = 0; s < kVectors; ++s) {
        const __m512i codes = _mm512_cvtepi8_epi32(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + column + 16 * s)));
        sum[s] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), _mm512_set1_ps(dj[s / 2]), sum[s]);
      }
    } else {
      const __m512 scale = _mm512_set1_ps(h[j]);
#pragma GCC unroll 8
      for (int s = 0; s < kVectors; ++s) {
        const __m512i bits = _mm512_slli_epi32(
            _mm512_cvtepu16_epi32(
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 2 * column + 32 * s))),
            16);
        sum[s] = _mm512_fmadd_ps(_mm512_castsi512_ps(bits), scale, sum[s]);
      }
    }
  }
#pragma GCC unroll 8
  for (int s = 0; s < kVectors; ++s) _mm512_storeu_ps(y + column + 16 * s, sum[s]);
}

template <class Format>
void add_neurons_of(Context& ctx, const PackedNeurons& list, Activation phi, const NeuronInput& x,
                    float* y, float* scratch) {
  const NeuronLayout layout = neuron_layout(list.dtype, list.cols);
  const std::int64_t bytes = layout.neuron_bytes();
  const std::int64_t n_units = list.cols / 32;
  float* d = scratch;
  float* m = scratch + kBatch * n_units;
  for (std::int64_t first = 0; first < list.count; first += kBatch) {
    const std::int64_t n = std::min(kBatch, list.count - first);
    float gate[kBatch], up[kBatch];
    const Byte* down[kBatch];
    for (std::int64_t j = 0; j < n; ++j) {
      fetch(list, bytes, first + j + kAhead);
      const auto* row = reinterpret_cast<const Byte*>(list.data + list.id(first + j) * bytes);
      gate[j] = Format::dot(row, list.cols, x);
      up[j] = Format::dot(row + layout.row_bytes(), list.cols, x);
      down[j] = row + 2 * layout.row_bytes();
    }
    // One row at a time runs on the calling thread.
    gated_activation(ctx, phi, ConstMatrix(gate, 1, n), ConstMatrix(up, 1, n), Matrix(gate, 1, n));
    for (std::int64_t j = 0; j < n; ++j) {
      if (list.mean != nullptr) gate[j] -= list.mean[list.id(first + j)];
      if constexpr (Format::kBits < 16) {
        const __m512 h = _mm512_set1_ps(gate[j]);
        for (std::int64_t u = 0; u < n_units; u += 16) {
          const __mmask16 lanes = first_lanes(n_units - u);
          _mm512_mask_storeu_ps(d + j * n_units + u, lanes,
                                _mm512_mul_ps(h, load_halves(lanes, down[j] + 2 * u)));
          if constexpr (Format::kHasMin) {
            _mm512_mask_storeu_ps(
                m + j * n_units + u, lanes,
                _mm512_mul_ps(h, load_halves(lanes, down[j] + 2 * (n_units + u))));
          }
        }
      }
      down[j] += layout.scale_bytes;
    }
    std::int64_t column = 0;
    for (; column + 128 <= list.cols; column += 128) {
      add_columns<Format, 128>(down, n, n_units, column, gate, d, m, y);
    }
    if (column < list.cols) add_columns<Format, 64>(down, n, n_units, column, gate, d, m, y);
  }
}

}  // namespace
#pragma GCC pop_options

void add_packed_neurons(Context& ctx, const PackedNeurons& list, Activation phi,
                        const NeuronInput& x, float* y, float* scratch) {
  switch (list.dtype) {
    case DType::Q4_0:
      return add_neurons_of<NeuronsQ4_0>(ctx, list, phi, x, y, scratch);
    case DType::Q4_1:
      return add_neurons_of<NeuronsQ4_1>(ctx, list, phi, x, y, scratch);
    case DType::Q8_0:
      return add_neurons_of<NeuronsQ8_0>(ctx, list, phi, x, y, scratch);
    case DType::BF16:
      return add_neurons_of<NeuronsBF16>(ctx, list, phi, x, y, scratch);
    default:
      return;  // has_neurons() says no
  }
}
#else
void add_packed_neurons(Context&, const PackedNeurons&, Activation, const NeuronInput&, float*,
                        float*) {}  // has_neurons() says no
#endif

}  // namespace moesaic::kernels
