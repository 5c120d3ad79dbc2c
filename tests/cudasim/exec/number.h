#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include "tests/cudasim/base.h"

namespace cudasim {

struct Half {
  u16 bits;
};
struct Bf16 {
  u16 bits;
};
/// Two values in 32 bits, the first in the low half.
template <class T>
struct Pair {
  T low, high;
};

inline float to_float(Bf16 v) { return std::bit_cast<float>(static_cast<u32>(v.bits) << 16); }

inline float to_float(Half v) {
  // Exponent and mantissa moved into place, then scaled: exact, subnormal numbers too.
  const u32 magnitude = static_cast<u32>(v.bits & 0x7fff) << 13;
  const u32 sign = static_cast<u32>(v.bits & 0x8000) << 16;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const u32 special = std::bit_cast<u32>(scaled) | 0x7f800000u;
  const u32 bits = (v.bits & 0x7c00) == 0x7c00 ? special : std::bit_cast<u32>(scaled);
  return std::bit_cast<float>(bits | sign);
}

/// Round to nearest even; NaN becomes the canonical 0x7fff.
inline Bf16 to_bf16(float f) {
  const u32 b = std::bit_cast<u32>(f);
  const u32 rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
  return {static_cast<u16>((b & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded)};
}

/// Round to nearest even; NaN becomes the canonical 0x7fff.
inline Half to_half(float f) {
  const u32 b = std::bit_cast<u32>(f);
  const u32 sign = b >> 16 & 0x8000;
  const u32 magnitude = b & 0x7fffffff;
  // Below 2^-14 the sum with 0.5 rounds to multiples of 2^-24, the unit of subnormal halves.
  const float tiny = std::bit_cast<float>(magnitude) + 0.5f;
  const u32 subnormal = std::bit_cast<u32>(tiny) - 0x3f000000;
  const u32 normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  u32 r = magnitude < 0x38800000 ? subnormal : normal;
  r = magnitude >= 0x47800000 ? 0x7c00 : r;
  r = magnitude > 0x7f800000 ? 0x7fff : (r | sign);
  return {static_cast<u16>(r)};
}

/// The double nearest to v as a float, with the last bit set if it was not exact: rounding the
/// result again to a type of at most 22 bits gives what rounding v once would.
inline float to_odd_float(double v) {
  const float f = static_cast<float>(v);
  const double back = f;
  u32 bits = std::bit_cast<u32>(f);
  const bool inexact = back != v && v - v == 0;
  const bool away = std::fabs(back) > std::fabs(v);
  bits = inexact ? ((away ? bits - 1 : bits) | 1) : bits;
  return std::bit_cast<float>(bits);
}

/// a · b + c rounded to odd, for products that are exact in double.
inline double fma_to_odd(double a, double b, double c) {
  const double p = a * b;
  const double s = p + c;
  const double t = s - p;
  const double error = (p - (s - t)) + (c - t);
  u64 bits = std::bit_cast<u64>(s);
  const bool inexact = error != 0 && error - error == 0 && s - s == 0;
  const bool away = (error > 0) != (s > 0);  // |s| is above the exact sum
  bits = inexact ? ((away ? bits - 1 : bits) | 1) : bits;
  return std::bit_cast<double>(bits);
}

template <class T>
T half_from(float f);
template <>
inline Half half_from<Half>(float f) {
  return to_half(f);
}
template <>
inline Bf16 half_from<Bf16>(float f) {
  return to_bf16(f);
}

inline constexpr float kNan = std::bit_cast<float>(0x7fffffffu);
inline const double kNan64 = std::bit_cast<double>(0x7fffffffffffffffull);

/// Subnormal numbers become zero of their sign.
inline float flush(float v) {
  const u32 b = std::bit_cast<u32>(v);
  return std::bit_cast<float>((b & 0x7f800000) == 0 ? b & 0x80000000 : b);
}

}  // namespace cudasim
