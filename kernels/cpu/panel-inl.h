// The lanes in which products with panels are computed: kRows rows of a panel side by side. Per-
// target header: included once for each instruction set.
#if defined(MOESAIC_KERNELS_CPU_PANEL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOESAIC_KERNELS_CPU_PANEL_INL_H_
#undef MOESAIC_KERNELS_CPU_PANEL_INL_H_
#else
#define MOESAIC_KERNELS_CPU_PANEL_INL_H_
#endif

#include <cstdint>
#include <cstring>

#include "hwy/highway.h"
#include "kernels/quant.h"

// Within AVX3 the code below also uses VNNI and bfloat16 dot products, which Highway 1.0 has no
// target for; whoever calls it checks that the machine has them.
#undef MOESAIC_PANEL_TARGET
#undef MOESAIC_PANEL_LAMBDA
#define MOESAIC_PANEL_LAMBDA __attribute__((always_inline))
#if HWY_TARGET == HWY_AVX3
#define MOESAIC_PANEL_TARGET HWY_TARGET_STR ",avx512vnni,avx512bf16"
#elif HWY_TARGET == HWY_AVX2
#define MOESAIC_PANEL_TARGET HWY_TARGET_STR
#endif

#ifdef MOESAIC_PANEL_TARGET
HWY_PUSH_ATTRIBUTES(MOESAIC_PANEL_TARGET)
#else
HWY_BEFORE_NAMESPACE();
#endif
namespace moesaic::kernels {
namespace HWY_NAMESPACE {

using Byte = std::uint8_t;

#if HWY_TARGET == HWY_AVX3

inline constexpr int kRows = 16;
inline constexpr int kTokensAtOnce = 8;  // two accumulators each, 32 registers
/// Whether dot() takes Q8_0's codes without their bias of 128.
inline constexpr bool kSignedDot = false;

using F = __m512;
using I = __m512i;
using U = __m512i;  // four codes for each row

HWY_INLINE F zero() { return _mm512_setzero_ps(); }
HWY_INLINE F broadcast(const float* p) { return _mm512_set1_ps(*p); }
HWY_INLINE I broadcast(const std::int32_t* p) { return _mm512_set1_epi32(*p); }
HWY_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
HWY_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
HWY_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
HWY_INLINE F mul_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
HWY_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
template <int n>
HWY_INLINE I shift_left(I a) {
  return _mm512_slli_epi32(a, n);
}
HWY_INLINE F load_f16(const Byte* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
HWY_INLINE F load_u8(const Byte* p) {
  return to_float(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
HWY_INLINE F load_s8(const Byte* p) {
  return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
HWY_INLINE void store(F a, float* p) { _mm512_storeu_ps(p, a); }
HWY_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }

HWY_INLINE U load_codes(const Byte* p) { return _mm512_load_si512(p); }
HWY_INLINE U low_nibbles(U a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
HWY_INLINE U high_nibbles(U a) { return low_nibbles(_mm512_srli_epi16(a, 4)); }
/// a | 16 where the bit is set; bit 4r + c of `bits` is of row r, and first_row is this vector's.
HWY_INLINE U or_fifth_bits(U a, const Byte* bits, int) {
  __mmask64 mask;
  std::memcpy(&mask, bits, sizeof(mask));
  return _mm512_mask_add_epi8(a, mask, a, _mm512_set1_epi8(16));
}
/// a | pair << 4, pair being bits 2j and 2j + 1 of each byte of `pairs`.
template <int j>
HWY_INLINE U or_pairs(U a, U pairs) {
  U moved = pairs;
  if constexpr (j == 0) moved = _mm512_slli_epi16(pairs, 4);
  if constexpr (j == 1) moved = _mm512_slli_epi16(pairs, 2);
  if constexpr (j == 3) moved = _mm512_srli_epi16(pairs, 2);
  return _mm512_ternarylogic_epi32(a, moved, _mm512_set1_epi8(48), 0xf8);  // a | (moved & 48)
}

HWY_INLINE I four(const std::int8_t* x) {
  std::int32_t bits;
  std::memcpy(&bits, x, sizeof(bits));
  return _mm512_set1_epi32(bits);
}
/// sum[row] + Σ_c codes[row][c] x[c] over four columns.
HWY_INLINE I dot(I sum, U codes, const std::int8_t* x) {
  return _mm512_dpbusd_epi32(sum, codes, four(x));
}
HWY_INLINE I dot_q8(I sum, U codes, const std::int8_t* x) { return dot(sum, codes, x); }
/// sum[row] + Σ_c w[row][c] x[c] over two columns of bfloat16.
HWY_INLINE F dot_bf16(F sum, U w, const std::uint16_t* x) {
  const I pair = four(reinterpret_cast<const std::int8_t*>(x));
  return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)pair);
}

/// Asks for the line `ahead` bytes beyond p, which may lie outside p's object.
HWY_INLINE void prefetch(const Byte* p, std::uintptr_t ahead) {
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(p) + ahead),
               _MM_HINT_T0);
}

#elif HWY_TARGET == HWY_AVX2

inline constexpr int kRows = 8;
inline constexpr int kTokensAtOnce = 4;
inline constexpr bool kSignedDot = true;

using F = __m256;
using I = __m256i;
using U = __m256i;

HWY_INLINE F zero() { return _mm256_setzero_ps(); }
HWY_INLINE F broadcast(const float* p) { return _mm256_set1_ps(*p); }
HWY_INLINE I broadcast(const std::int32_t* p) { return _mm256_set1_epi32(*p); }
HWY_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
HWY_INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }
HWY_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
HWY_INLINE F mul_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
HWY_INLINE F to_float(I a) { return _mm256_cvtepi32_ps(a); }
template <int n>
HWY_INLINE I shift_left(I a) {
  return _mm256_slli_epi32(a, n);
}
HWY_INLINE F load_f16(const Byte* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
HWY_INLINE F load_u8(const Byte* p) {
  return to_float(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
HWY_INLINE F load_s8(const Byte* p) {
  return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
HWY_INLINE void store(F a, float* p) { _mm256_storeu_ps(p, a); }
HWY_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }

HWY_INLINE U load_codes(const Byte* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}
HWY_INLINE U low_nibbles(U a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
HWY_INLINE U high_nibbles(U a) { return low_nibbles(_mm256_srli_epi16(a, 4)); }
HWY_INLINE U or_fifth_bits(U a, const Byte* bits, int first_row) {
  std::int32_t mask;
  std::memcpy(&mask, bits + first_row / 2, sizeof(mask));
  // Byte i gets byte i / 8 of the mask, and of it bit i % 8.
  const U spread = _mm256_shuffle_epi8(
      _mm256_set1_epi32(mask),
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
  const U bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
  const U set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
  return _mm256_or_si256(a, _mm256_and_si256(set, _mm256_set1_epi8(16)));
}
template <int j>
HWY_INLINE U or_pairs(U a, U pairs) {
  U moved = pairs;
  if constexpr (j == 0) moved = _mm256_slli_epi16(pairs, 4);
  if constexpr (j == 1) moved = _mm256_slli_epi16(pairs, 2);
  if constexpr (j == 3) moved = _mm256_srli_epi16(pairs, 2);
  return _mm256_or_si256(a, _mm256_and_si256(moved, _mm256_set1_epi8(48)));
}

HWY_INLINE I four(const std::int8_t* x) {
  std::int32_t bits;
  std::memcpy(&bits, x, sizeof(bits));
  return _mm256_set1_epi32(bits);
}
// Products are added in pairs as 16-bit integers: 2 · 63 · 127 fits, so does 2 · 128 · 127.
HWY_INLINE I dot(I sum, U codes, const std::int8_t* x) {
  const I pairs = _mm256_maddubs_epi16(codes, four(x));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
HWY_INLINE I dot_q8(I sum, U codes, const std::int8_t* x) {
  const I w = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
  const I pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(four(x), w));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
HWY_INLINE F dot_bf16(F sum, U w, const std::uint16_t* x) {
  const I pair = four(reinterpret_cast<const std::int8_t*>(x));
  const I upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const F second = mul_add(_mm256_castsi256_ps(_mm256_and_si256(w, upper)),
                           _mm256_castsi256_ps(_mm256_and_si256(pair, upper)), sum);
  return mul_add(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)),
                 _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)), second);
}

/// Asks for the line `ahead` bytes beyond p, which may lie outside p's object.
HWY_INLINE void prefetch(const Byte* p, std::uintptr_t ahead) {
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(p) + ahead),
               _MM_HINT_T0);
}

#else

// One row at a time; the compiler makes what it can of it.
inline constexpr int kRows = 1;
inline constexpr int kTokensAtOnce = 4;
inline constexpr bool kSignedDot = true;

using F = float;
using I = std::int32_t;
struct U {
  Byte code[4];
};

HWY_INLINE F zero() { return 0; }
HWY_INLINE F broadcast(const float* p) { return *p; }
HWY_INLINE I broadcast(const std::int32_t* p) { return *p; }
HWY_INLINE F add(F a, F b) { return a + b; }
HWY_INLINE I add(I a, I b) { return a + b; }
HWY_INLINE F mul(F a, F b) { return a * b; }
HWY_INLINE F mul_add(F a, F b, F c) { return a * b + c; }
HWY_INLINE F to_float(I a) { return static_cast<float>(a); }
template <int n>
HWY_INLINE I shift_left(I a) {
  return a * (1 << n);
}
HWY_INLINE F load_f16(const Byte* p) {
  std::uint16_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  return f16_to_f32(bits);
}
HWY_INLINE F load_u8(const Byte* p) { return static_cast<float>(*p); }
HWY_INLINE F load_s8(const Byte* p) { return static_cast<float>(static_cast<std::int8_t>(*p)); }
HWY_INLINE void store(F a, float* p) { *p = a; }
HWY_INLINE F load(const float* p) { return *p; }

HWY_INLINE U load_codes(const Byte* p) {
  U u;
  std::memcpy(u.code, p, sizeof(u.code));
  return u;
}
HWY_INLINE U low_nibbles(U a) {
  for (Byte& c : a.code) c &= 15;
  return a;
}
HWY_INLINE U high_nibbles(U a) {
  for (Byte& c : a.code) c >>= 4;
  return a;
}
HWY_INLINE U or_fifth_bits(U a, const Byte* bits, int first_row) {
  const int own = bits[first_row / 2] >> (4 * (first_row % 2));
  for (int c = 0; c < 4; ++c) a.code[c] |= static_cast<Byte>((own >> c & 1) << 4);
  return a;
}
template <int j>
HWY_INLINE U or_pairs(U a, U pairs) {
  for (int c = 0; c < 4; ++c) a.code[c] |= static_cast<Byte>((pairs.code[c] >> (2 * j) & 3) << 4);
  return a;
}
HWY_INLINE I dot(I sum, U codes, const std::int8_t* x) {
  for (int c = 0; c < 4; ++c) sum += codes.code[c] * x[c];
  return sum;
}
HWY_INLINE I dot_q8(I sum, U codes, const std::int8_t* x) {
  for (int c = 0; c < 4; ++c) sum += (codes.code[c] - 128) * x[c];
  return sum;
}
HWY_INLINE F dot_bf16(F sum, U w, const std::uint16_t* x) {
  std::uint16_t pair[2];
  std::memcpy(pair, w.code, sizeof(pair));
  sum += bf16_to_f32(pair[1]) * bf16_to_f32(x[1]);
  return sum + bf16_to_f32(pair[0]) * bf16_to_f32(x[0]);
}
HWY_INLINE void prefetch(const Byte*, std::uintptr_t) {}

#endif

}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
#ifdef MOESAIC_PANEL_TARGET
HWY_POP_ATTRIBUTES
#else
HWY_AFTER_NAMESPACE();
#endif

#endif  // per-target include guard
