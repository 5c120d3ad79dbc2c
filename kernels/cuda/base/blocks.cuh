#pragma once

#include <cuda_fp16.h>

#include <bit>
#include <cstdint>

#include "kernels/base/dtype.h"
#include "kernels/base/error.h"

/// The block formats of GGUF, unpacked by a warp: 256 columns at a time, 8 a lane, as kVectors
/// vectors of kWidth neighbouring columns. Values are bit for bit those of
/// kernels::dequantize_row: products and sums rounded one by one.
namespace moesaic::cuda {

inline constexpr int kGroup = 256;  // columns that a warp unpacks at once

__device__ inline std::uint32_t load_u16(const std::uint8_t* p) {
  return *reinterpret_cast<const std::uint16_t*>(p);
}

/// Rows of 18-, 22- or 34-byte blocks leave words on even addresses only.
__device__ inline std::uint32_t load_u32_even(const std::uint8_t* p) {
  return load_u16(p) | load_u16(p + 2) << 16;
}

__device__ inline float load_f16(const std::uint8_t* p) {
  return __half2float(*reinterpret_cast<const __half*>(p));
}

__device__ inline std::uint32_t byte_of(std::uint32_t word, int i) {
  return word >> (8 * i) & 0xffu;
}

/// F32, F16, BF16: vector v of a lane is the columns from 128 v + 4 lane. Columns from n on are
/// zero and not read.
template <class Scalar>
struct Plain {
  static constexpr int kElems = 1, kBytes = Scalar::kBytes, kWidth = 4, kVectors = 2;
  __device__ static int column(int lane, int v) { return 128 * v + 4 * lane; }
  __device__ static void unpack(const std::uint8_t* p, int lane, int n, float (&w)[8]) {
    for (int v = 0; v < kVectors; ++v) {
      const int c = column(lane, v);
      Scalar::load(p + c * kBytes, n - c, w + 4 * v);
    }
  }
};

struct F32Scalar {
  static constexpr int kBytes = 4;
  __device__ static void load(const std::uint8_t* p, int n, float* w) {
    for (int i = 0; i < 4; ++i) w[i] = i < n ? reinterpret_cast<const float*>(p)[i] : 0.0f;
  }
};

/// Four 16-bit elements in one read where their address allows it, which is the same for all lanes.
template <class Convert>
__device__ void load_four_halves(const std::uint8_t* p, int n, float* w, Convert convert) {
  if (n >= 4 && (reinterpret_cast<std::uintptr_t>(p) & 7) == 0) {
    const uint2 bits = *reinterpret_cast<const uint2*>(p);
    w[0] = convert(bits.x & 0xffffu);
    w[1] = convert(bits.x >> 16);
    w[2] = convert(bits.y & 0xffffu);
    w[3] = convert(bits.y >> 16);
    return;
  }
  for (int i = 0; i < 4; ++i) w[i] = i < n ? convert(load_u16(p + 2 * i)) : 0.0f;
}

struct F16Scalar {
  static constexpr int kBytes = 2;
  __device__ static void load(const std::uint8_t* p, int n, float* w) {
    load_four_halves(p, n, w, [](std::uint32_t bits) {
      return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    });
  }
};

struct BF16Scalar {
  static constexpr int kBytes = 2;
  __device__ static void load(const std::uint8_t* p, int n, float* w) {
    load_four_halves(p, n, w, [](std::uint32_t bits) { return __uint_as_float(bits << 16); });
  }
};

using F32 = Plain<F32Scalar>;
using F16 = Plain<F16Scalar>;
using BF16 = Plain<BF16Scalar>;

/// Formats of 32 columns a block: four lanes share a block, of which each has columns 4 p to 4 p +
/// 3 and 16 more. `Block` gives the 8 values.
template <class Block>
struct Blocks32 {
  static constexpr int kElems = 32, kBytes = Block::kBytes, kWidth = 4, kVectors = 2;
  __device__ static int column(int lane, int v) { return lane / 4 * 32 + lane % 4 * 4 + 16 * v; }
  __device__ static void unpack(const std::uint8_t* p, int lane, int n, float (&w)[8]) {
    if (column(lane, 0) >= n) {
      for (float& value : w) value = 0;
      return;
    }
    Block::unpack(p + lane / 4 * kBytes, lane % 4 * 4, w);
  }
};

__device__ inline float scaled(int level, float d) {
  return __fmul_rn(static_cast<float>(level), d);
}

struct Q4_0Block {
  static constexpr int kBytes = 18;
  __device__ static void unpack(const std::uint8_t* p, int at, float (&w)[8]) {
    const float d = load_f16(p);
    const std::uint32_t codes = load_u32_even(p + 2 + at);
    for (int i = 0; i < 4; ++i) {
      w[i] = scaled(static_cast<int>(codes >> (8 * i) & 15u) - 8, d);
      w[4 + i] = scaled(static_cast<int>(codes >> (8 * i + 4) & 15u) - 8, d);
    }
  }
};

struct Q4_1Block {
  static constexpr int kBytes = 20;
  __device__ static void unpack(const std::uint8_t* p, int at, float (&w)[8]) {
    const float d = load_f16(p), m = load_f16(p + 2);
    const std::uint32_t codes = *reinterpret_cast<const std::uint32_t*>(p + 4 + at);
    for (int i = 0; i < 4; ++i) {
      w[i] = __fadd_rn(scaled(static_cast<int>(codes >> (8 * i) & 15u), d), m);
      w[4 + i] = __fadd_rn(scaled(static_cast<int>(codes >> (8 * i + 4) & 15u), d), m);
    }
  }
};

/// The 5-bit levels of a lane: nibbles, and bits at + i and at + 16 + i of the block's fifth bits.
__device__ inline void levels_5bit(std::uint32_t high, std::uint32_t codes, int at,
                                   int (&level)[8]) {
  for (int i = 0; i < 4; ++i) {
    level[i] = static_cast<int>((codes >> (8 * i) & 15u) | (high >> (at + i) & 1u) << 4);
    level[4 + i] =
        static_cast<int>((codes >> (8 * i + 4) & 15u) | (high >> (at + 16 + i) & 1u) << 4);
  }
}

struct Q5_0Block {
  static constexpr int kBytes = 22;
  __device__ static void unpack(const std::uint8_t* p, int at, float (&w)[8]) {
    const float d = load_f16(p);
    int level[8];
    levels_5bit(load_u32_even(p + 2), load_u32_even(p + 6 + at), at, level);
    for (int i = 0; i < 8; ++i) w[i] = scaled(level[i] - 16, d);
  }
};

struct Q5_1Block {
  static constexpr int kBytes = 24;
  __device__ static void unpack(const std::uint8_t* p, int at, float (&w)[8]) {
    const float d = load_f16(p), m = load_f16(p + 2);
    int level[8];
    levels_5bit(*reinterpret_cast<const std::uint32_t*>(p + 4),
                *reinterpret_cast<const std::uint32_t*>(p + 8 + at), at, level);
    for (int i = 0; i < 8; ++i) w[i] = __fadd_rn(scaled(level[i], d), m);
  }
};

struct Q8_0Block {
  static constexpr int kBytes = 34;
  __device__ static void unpack(const std::uint8_t* p, int at, float (&w)[8]) {
    const float d = load_f16(p);
    const std::uint32_t low = load_u32_even(p + 2 + at), high = load_u32_even(p + 18 + at);
    for (int i = 0; i < 4; ++i) {
      w[i] = scaled(static_cast<std::int8_t>(byte_of(low, i)), d);
      w[4 + i] = scaled(static_cast<std::int8_t>(byte_of(high, i)), d);
    }
  }
};

using Q4_0 = Blocks32<Q4_0Block>;
using Q4_1 = Blocks32<Q4_1Block>;
using Q5_0 = Blocks32<Q5_0Block>;
using Q5_1 = Blocks32<Q5_1Block>;
using Q8_0 = Blocks32<Q8_0Block>;

/// Scale and minimum of sub-block b of 8: six bits each in 12 bytes (kernels/cpu/quant.cc has the
/// layout).
__device__ inline void sub_scale(const std::uint8_t* p, int b, float d, float d_min, float& scale,
                                 float& min) {
  int s, m;
  if (b < 4) {
    s = p[b] & 63;
    m = p[b + 4] & 63;
  } else {
    s = (p[b + 4] & 15) | p[b - 4] >> 6 << 4;
    m = p[b + 4] >> 4 | p[b] >> 6 << 4;
  }
  scale = __fmul_rn(d, static_cast<float>(s));
  min = __fmul_rn(d_min, static_cast<float>(m));
}

/// Q4_K and Q5_K: eight lanes share two sub-blocks of 32 columns, of which each has four columns.
template <bool kFifthBit>
struct K4Or5 {
  static constexpr int kElems = 256, kBytes = kFifthBit ? 176 : 144, kWidth = 4, kVectors = 2;
  __device__ static int column(int lane, int v) { return lane / 8 * 64 + lane % 8 * 4 + 32 * v; }
  __device__ static void unpack(const std::uint8_t* p, int lane, int n, float (&w)[8]) {
    if (column(lane, 0) >= n) {
      for (float& value : w) value = 0;
      return;
    }
    const float d = load_f16(p), d_min = load_f16(p + 2);
    const int pair = lane / 8, at = lane % 8 * 4;
    const std::uint8_t* codes_at = p + (kFifthBit ? 48 : 16) + 32 * pair + at;
    const std::uint32_t codes = *reinterpret_cast<const std::uint32_t*>(codes_at);
    std::uint32_t high = 0;
    if constexpr (kFifthBit) high = *reinterpret_cast<const std::uint32_t*>(p + 16 + at);
    for (int v = 0; v < 2; ++v) {
      float scale, min;
      sub_scale(p + 4, 2 * pair + v, d, d_min, scale, min);
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t level =
            (codes >> (8 * i + 4 * v) & 15u) | (high >> (8 * i + 2 * pair + v) & 1u) << 4;
        w[4 * v + i] = __fsub_rn(__fmul_rn(scale, static_cast<float>(level)), min);
      }
    }
  }
};
using Q4_K = K4Or5<false>;
using Q5_K = K4Or5<true>;

/// Q6_K: sixteen lanes share 128 columns; vector v of a lane is two columns of their v-th quarter.
struct Q6_K {
  static constexpr int kElems = 256, kBytes = 210, kWidth = 2, kVectors = 4;
  __device__ static int column(int lane, int v) { return lane / 16 * 128 + lane % 16 * 2 + 32 * v; }
  __device__ static void unpack(const std::uint8_t* p, int lane, int n, float (&w)[8]) {
    if (column(lane, 0) >= n) {
      for (float& value : w) value = 0;
      return;
    }
    const float d = load_f16(p + 208);
    const int half = lane / 16, at = lane % 16 * 2;
    const std::uint32_t low[2] = {load_u16(p + 64 * half + at), load_u16(p + 64 * half + 32 + at)};
    const std::uint32_t high = load_u16(p + 128 + 32 * half + at);
    for (int v = 0; v < 4; ++v) {
      const auto code = static_cast<std::int8_t>(p[192 + 8 * half + 2 * v + at / 16]);
      const float scale = __fmul_rn(d, static_cast<float>(code));
      for (int i = 0; i < 2; ++i) {
        const int level = static_cast<int>((low[v % 2] >> (8 * i + v / 2 * 4) & 15u) |
                                           (high >> (8 * i + 2 * v) & 3u) << 4);
        w[2 * v + i] = __fmul_rn(scale, static_cast<float>(level - 32));
      }
    }
  }
};

/// Calls fn.template operator()<Format>() with the format of the dtype.
template <class Fn>
void visit_format(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::F32:
      return fn.template operator()<F32>();
    case DType::F16:
      return fn.template operator()<F16>();
    case DType::BF16:
      return fn.template operator()<BF16>();
    case DType::Q4_0:
      return fn.template operator()<Q4_0>();
    case DType::Q4_1:
      return fn.template operator()<Q4_1>();
    case DType::Q5_0:
      return fn.template operator()<Q5_0>();
    case DType::Q5_1:
      return fn.template operator()<Q5_1>();
    case DType::Q8_0:
      return fn.template operator()<Q8_0>();
    case DType::Q4_K:
      return fn.template operator()<Q4_K>();
    case DType::Q5_K:
      return fn.template operator()<Q5_K>();
    case DType::Q6_K:
      return fn.template operator()<Q6_K>();
  }
}

}  // namespace moesaic::cuda
