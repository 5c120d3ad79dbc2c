#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

// What products with single neurons and columns share, for machines with AVX-512, VNNI and
// bfloat16. A file that includes this compiles its own functions for the same target.

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,f16c,fma")
namespace moesaic::kernels {
namespace {

using Byte = std::uint8_t;

[[gnu::always_inline]] inline __mmask16 first_lanes(std::int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1);
}

[[gnu::always_inline]] inline __m512 load_halves(__mmask16 lanes, const Byte* p) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p));
}

[[gnu::always_inline]] inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }

/// 128 high + low, as float32.
[[gnu::always_inline]] inline __m512 join_digits(__m512i high, __m512i low) {
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 7), low));
}

/// Bytes of four rows side by side: word 4 l + e of part i holds byte 16 l + 4 i + e of each.
[[gnu::always_inline]] inline void four_rows(__m512i a, __m512i b, __m512i c, __m512i d,
                                             __m512i (&part)[4]) {
  const __m512i ab = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
  const __m512i cd = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
  part[0] = _mm512_unpacklo_epi16(ab, cd);
  part[1] = _mm512_unpackhi_epi16(ab, cd);
  part[2] = _mm512_unpacklo_epi16(ab_high, cd_high);
  part[3] = _mm512_unpackhi_epi16(ab_high, cd_high);
}

/// Bits of a code, whether a block has a minimum, what codes are too high by.
template <int kBitsV, bool kHasMinV, int kBiasV>
struct Format {
  static constexpr int kBits = kBitsV;
  static constexpr bool kHasMin = kHasMinV;
  static constexpr int kBias = kBiasV;
};

using FormatBF16 = Format<16, false, 0>;
using FormatQ4_0 = Format<4, false, 8>;
using FormatQ4_1 = Format<4, true, 0>;
using FormatQ8_0 = Format<8, false, 128>;

}  // namespace
}  // namespace moesaic::kernels
#pragma GCC pop_options
#endif  // x86_64
