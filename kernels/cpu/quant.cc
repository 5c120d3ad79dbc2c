#include "kernels/quant.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/quant.cc"
#include "hwy/foreach_target.h"  // compiles this file once per instruction set
// The namespace macros of highway.h belong to the target that foreach_target.h has just set.
#include "hwy/highway.h"
//
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "kernels/base/error.h"

HWY_BEFORE_NAMESPACE();
namespace moesaic::kernels {
namespace HWY_NAMESPACE {
namespace {

// Plain loops of fixed length that the compiler vectorises for each target. Every product and sum
// is rounded on its own (-ffp-contract=off), so all targets give the same bits.

HWY_INLINE float f16_value(std::uint32_t bits) {
  // Exponent and mantissa move into float32 place; the product with 2^112 corrects the exponent
  // bias, exactly, for subnormals too. Inf and NaN need their exponent filled up.
  const std::uint32_t magnitude = (bits & 0x7fffu) << 13;
  const std::uint32_t scaled =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const std::uint32_t value =
      magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000u : scaled;  // Inf and NaN : the rest
  return std::bit_cast<float>(value | (bits & 0x8000u) << 16);
}

HWY_INLINE std::uint16_t bf16_bits(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const std::uint32_t quiet_nan = bits >> 16 | 0x40u;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

HWY_INLINE std::uint16_t load_u16(const std::uint8_t* p) {
  std::uint16_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}

HWY_INLINE std::uint32_t load_u32(const std::uint8_t* p) {
  std::uint32_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}

HWY_INLINE float load_f16(const std::uint8_t* p) { return f16_value(load_u16(p)); }

// One struct per block format: unpack() writes the kElems values of the block at p.

struct F32 {
  static constexpr int kElems = 1, kBytes = 4;
  static HWY_INLINE void unpack(const std::uint8_t* HWY_RESTRICT p, float* HWY_RESTRICT y) {
    std::memcpy(y, p, sizeof(float));
  }
};

struct F16 {
  static constexpr int kElems = 1, kBytes = 2;
  static HWY_INLINE void unpack(const std::uint8_t* HWY_RESTRICT p, float* HWY_RESTRICT y) {
    *y = load_f16(p);
  }
};

struct BF16 {
  static constexpr int kElems = 1, kBytes = 2;
  static HWY_INLINE void unpack(const std::uint8_t* HWY_RESTRICT p, float* HWY_RESTRICT y) {
    *y = std::bit_cast<float>(static_cast<std::uint32_t>(load_u16(p)) << 16);
  }
};

// The 4-bit levels of 32 elements: low nibbles are elements 0..15, high ones 16..31.
HWY_INLINE void unpack_4bit(const std::uint8_t* HWY_RESTRICT q, std::int32_t* HWY_RESTRICT level) {
  for (int j = 0; j < 16; ++j) level[j] = q[j] & 15;
  for (int j = 0; j < 16; ++j) level[j + 16] = q[j] >> 4;
}

// d f16, 16 bytes of nibbles.
struct Q4_0 {
  static constexpr int kElems = 32, kBytes = 18;
  static HWY_INLINE void unpack(const std::uint8_t* HWY_RESTRICT p, float* HWY_RESTRICT y) {
    const float d = load_f16(p);
    alignas(64) std::int32_t level[32];
    unpack_4bit(p + 2, level);
    for (int j = 0; j < 32; ++j) y[j] = static_cast<float>(level[j] - 8) * d;
  }
};

// d, m f16, 16 bytes of nibbles.
struct Q4_1 {
  static constexpr int kElems = 32, kBytes = 20;
  static HWY_INLINE void unpack(const std::uint8_t* HWY_RESTRICT p, float* HWY_RESTRICT y) {
    const float d = load_f16(p);
    const float m = load_f16(p + 2);
    alignas(64) std::int32_t level[32];
    unpack_4bit(p + 4, level);
    for (int j = 0; j < 32; ++j) y[j] = static_cast<float>(level[j]) * d + m;
  }
};

// Selecting by a mask per element vectorises without the per-lane shifts that baseline x86-64
// lacks.
constexpr std::array<std::uint32_t, 32> kBit = [] {
  std::array<std::uint32_t, 32> bit{};
  for (std::size_t j = 0; j < bit.size(); ++j) bit[j] = std::uint32_t{1} << j;
  return bit;
}();

// The 5-bit levels of 32 elements: fifth bits in a 32-bit word, nibbles as above.
HWY_INLINE void unpack_5bit(std::uint32_t high, const std::uint8_t* HWY_RESTRICT q,
                            std::int32_t* HWY_RESTRICT level) {
  unpack_4bit(q, level);
  for (int j = 0; j < 32; ++j) level[j] += (high & kBit[static_cast<std::size_t>(j)]) != 0 ? 16 : 0;
}

// d f16, fifth bits u32, nibbles.
struct Q5_0 {
  static constexpr int kElems = 32, kBytes = 22;
  static HWY_INLINE void unpack(const std::uint8_t* HWY_RESTRICT p, float* HWY_RESTRICT y) {
    const float d = load_f16(p);
    alignas(64) std::int32_t level[32];
    unpack_5bit(load_u32(p + 2), p + 6, level);
    for (int j = 0; j < 32; ++j) y[j] = static_cast<float>(level[j] - 16) * d;
  }
};

// d, m f16, fifth bits u32, nibbles.
struct Q5_1 {
  static constexpr int kElems = 32, kBytes = 24;
  static HWY_INLINE void unpack(const std::uint8_t* HWY_RESTRICT p, float* HWY_RESTRICT y) {
    const float d = load_f16(p);
    const float m = load_f16(p + 2);
    alignas(64) std::int32_t level[32];
    unpack_5bit(load_u32(p + 4), p + 8, level);
    for (int j = 0; j < 32; ++j) y[j] = static_cast<float>(level[j]) * d + m;
  }
};

// d f16, 32 signed bytes.
struct Q8_0 {
  static constexpr int kElems = 32, kBytes = 34;
  static HWY_INLINE void unpack(const std::uint8_t* HWY_RESTRICT p, float* HWY_RESTRICT y) {
    const float d = load_f16(p);
    const std::uint8_t* HWY_RESTRICT q = p + 2;
    for (int j = 0; j < 32; ++j) y[j] = static_cast<float>(static_cast<std::int8_t>(q[j])) * d;
  }
};

// Scale and minimum of each of the 8 sub-blocks of a Q4_K or Q5_K block, 6 bits each in 12 bytes:
// sub-blocks 0..3 in the low six bits of bytes 0..3 and 4..7; of sub-blocks 4..7 the low four bits
// in the nibbles of bytes 8..11, the upper two on top of bytes 0..7.
struct SubScales {
  float scale[8];
  float min[8];
};
HWY_INLINE SubScales unpack_scales(float d, float d_min, const std::uint8_t* HWY_RESTRICT p) {
  SubScales s;
  for (int j = 0; j < 4; ++j) {
    const int scale_high = (p[j + 8] & 15) | p[j] >> 6 << 4;
    const int min_high = p[j + 8] >> 4 | p[j + 4] >> 6 << 4;
    s.scale[j] = d * static_cast<float>(p[j] & 63);
    s.min[j] = d_min * static_cast<float>(p[j + 4] & 63);
    s.scale[j + 4] = d * static_cast<float>(scale_high);
    s.min[j + 4] = d_min * static_cast<float>(min_high);
  }
  return s;
}

// d, d_min f16, 12 bytes of scales, 128 of nibbles: each 32 bytes hold two sub-blocks, low and
// high.
struct Q4_K {
  static constexpr int kElems = 256, kBytes = 144;
  static HWY_INLINE void unpack(const std::uint8_t* HWY_RESTRICT p, float* HWY_RESTRICT y) {
    const SubScales s = unpack_scales(load_f16(p), load_f16(p + 2), p + 4);
    const std::uint8_t* HWY_RESTRICT q = p + 16;
    for (int b = 0; b < 8; b += 2, q += 32, y += 64) {
      for (int j = 0; j < 32; ++j) y[j] = s.scale[b] * static_cast<float>(q[j] & 15) - s.min[b];
      for (int j = 0; j < 32; ++j) {
        y[j + 32] = s.scale[b + 1] * static_cast<float>(q[j] >> 4) - s.min[b + 1];
      }
    }
  }
};

// As Q4_K with 32 bytes of fifth bits before the nibbles: bit b of byte j belongs to element j of
// sub-block b.
struct Q5_K {
  static constexpr int kElems = 256, kBytes = 176;
  static HWY_INLINE void unpack(const std::uint8_t* HWY_RESTRICT p, float* HWY_RESTRICT y) {
    const SubScales s = unpack_scales(load_f16(p), load_f16(p + 2), p + 4);
    const std::uint8_t* HWY_RESTRICT high = p + 16;
    const std::uint8_t* HWY_RESTRICT q = p + 48;
    for (int b = 0; b < 8; b += 2, q += 32, y += 64) {
      for (int j = 0; j < 32; ++j) {
        const int level = (q[j] & 15) | (high[j] >> b & 1) << 4;
        y[j] = s.scale[b] * static_cast<float>(level) - s.min[b];
      }
      for (int j = 0; j < 32; ++j) {
        const int level = q[j] >> 4 | (high[j] >> (b + 1) & 1) << 4;
        y[j + 32] = s.scale[b + 1] * static_cast<float>(level) - s.min[b + 1];
      }
    }
  }
};

// 128 bytes of low nibbles, 64 of upper bit pairs, 16 signed sub-block scales, d f16. Each half of
// 128 elements is four groups of 32; a sub-block has 16 elements.
struct Q6_K {
  static constexpr int kElems = 256, kBytes = 210;
  static HWY_INLINE void unpack(const std::uint8_t* HWY_RESTRICT p, float* HWY_RESTRICT y) {
    const float d = load_f16(p + 208);
    float scale[16];
    for (int b = 0; b < 16; ++b) {
      scale[b] = d * static_cast<float>(static_cast<std::int8_t>(p[192 + b]));
    }
    for (int half = 0; half < 2; ++half) {
      for (int group = 0; group < 4; ++group) {
        const std::uint8_t* HWY_RESTRICT low = p + 64 * half + 32 * (group & 1);
        const std::uint8_t* HWY_RESTRICT high = p + 128 + 32 * half;
        for (int sub = 0; sub < 2; ++sub, y += 16, low += 16, high += 16) {
          const float s = scale[8 * half + 2 * group + sub];
          for (int j = 0; j < 16; ++j) {
            const int level = (low[j] >> (group / 2 * 4) & 15) | (high[j] >> (2 * group) & 3) << 4;
            y[j] = s * static_cast<float>(level - 32);
          }
        }
      }
    }
  }
};

template <class Format>
HWY_INLINE void unpack_row(const std::uint8_t* HWY_RESTRICT src, std::int64_t n,
                           float* HWY_RESTRICT dst) {
  const std::int64_t n_blocks = n / Format::kElems;
  for (std::int64_t b = 0; b < n_blocks; ++b) {
    Format::unpack(src + b * Format::kBytes, dst + b * Format::kElems);
  }
}

void unpack(DType dtype, const std::uint8_t* HWY_RESTRICT src, std::int64_t n,
            float* HWY_RESTRICT dst) {
  switch (dtype) {
    case DType::F32:
      return unpack_row<F32>(src, n, dst);
    case DType::F16:
      return unpack_row<F16>(src, n, dst);
    case DType::BF16:
      return unpack_row<BF16>(src, n, dst);
    case DType::Q4_0:
      return unpack_row<Q4_0>(src, n, dst);
    case DType::Q4_1:
      return unpack_row<Q4_1>(src, n, dst);
    case DType::Q5_0:
      return unpack_row<Q5_0>(src, n, dst);
    case DType::Q5_1:
      return unpack_row<Q5_1>(src, n, dst);
    case DType::Q8_0:
      return unpack_row<Q8_0>(src, n, dst);
    case DType::Q4_K:
      return unpack_row<Q4_K>(src, n, dst);
    case DType::Q5_K:
      return unpack_row<Q5_K>(src, n, dst);
    case DType::Q6_K:
      return unpack_row<Q6_K>(src, n, dst);
  }
}

void unpack_bf16(DType dtype, const std::uint8_t* HWY_RESTRICT src, std::int64_t n,
                 std::uint16_t* HWY_RESTRICT dst) {
  constexpr std::int64_t kChunk = 1024;  // whole blocks of every format; 4 KiB stay in L1
  alignas(64) float values[kChunk];
  for (std::int64_t first = 0; first < n; first += kChunk) {
    const std::int64_t count = std::min(kChunk, n - first);
    unpack(dtype, src + row_bytes(dtype, first), count, values);
    for (std::int64_t i = 0; i < count; ++i) dst[first + i] = bf16_bits(values[i]);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moesaic::kernels {
namespace {

HWY_EXPORT(unpack);
HWY_EXPORT(unpack_bf16);

void check_row(DType dtype, std::size_t n) {
  const DTypeTraits& t = traits(dtype);
  require<ShapeError>(static_cast<std::int64_t>(n) % t.block_elems == 0,
                      "a {} row has {} elements, expected a multiple of {}", t.name, n,
                      t.block_elems);
}

}  // namespace

void dequantize_row(DType dtype, const std::byte* src, std::span<float> dst) {
  check_row(dtype, dst.size());
  HWY_DYNAMIC_DISPATCH(unpack)
  (dtype, reinterpret_cast<const std::uint8_t*>(src), static_cast<std::int64_t>(dst.size()),
   dst.data());
}

void dequantize_row_bf16(DType dtype, const std::byte* src, std::span<std::uint16_t> dst) {
  check_row(dtype, dst.size());
  HWY_DYNAMIC_DISPATCH(unpack_bf16)
  (dtype, reinterpret_cast<const std::uint8_t*>(src), static_cast<std::int64_t>(dst.size()),
   dst.data());
}

float bf16_to_f32(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

std::uint16_t f32_to_bf16(float value) { return HWY_STATIC_DISPATCH(bf16_bits)(value); }

float f16_to_f32(std::uint16_t bits) { return HWY_STATIC_DISPATCH(f16_value)(bits); }

std::uint16_t f32_to_f16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x1ffu);  // quiet NaN
  } else if (magnitude >= 0x47800000u) {          // 2^16 and above, Inf
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14, subnormal: adding ½ rounds at 2^-24, the spacing of float16 subnormals.
    half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    // A carry out of the mantissa goes on into the exponent, up to Inf, as it should.
    half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return static_cast<std::uint16_t>(sign | half);
}

}  // namespace moesaic::kernels
#endif  // HWY_ONCE
