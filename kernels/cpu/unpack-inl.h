// Packed rows as vectors of float32, in registers. Per-target header: included once for each
// instruction set with vectors; the portable build has its own way in dot-inl.h.
#if defined(MOESAIC_KERNELS_CPU_UNPACK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOESAIC_KERNELS_CPU_UNPACK_INL_H_
#undef MOESAIC_KERNELS_CPU_UNPACK_INL_H_
#else
#define MOESAIC_KERNELS_CPU_UNPACK_INL_H_
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "hwy/highway.h"
#include "kernels/base/dtype.h"

// A lambda inherits neither the target of the function around it nor inlining; without both the
// vectors it takes would go through memory.
#undef MOESAIC_LAMBDA
#define MOESAIC_LAMBDA HWY_ATTR __attribute__((always_inline))

#if HWY_TARGET != HWY_SCALAR && HWY_TARGET != HWY_EMU128
HWY_BEFORE_NAMESPACE();
namespace moesaic::kernels {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// At most 16 lanes: the block formats interleave runs of 16 elements.
using DF = hn::CappedTag<float, 16>;
using DI = hn::RebindToSigned<DF>;
using V = hn::Vec<DF>;
using VI = hn::Vec<DI>;
using MI = hn::Mask<DI>;
inline constexpr std::size_t kLanes = hn::MaxLanes(DF());
inline constexpr std::size_t kVectorsOf16 = 16 / kLanes;

template <std::size_t i>
using Index = std::integral_constant<std::size_t, i>;

/// fn(Index<0>), …, fn(Index<n − 1>), unrolled by the front end so that arrays of vectors indexed
/// by it stay in registers.
template <std::size_t n, class Fn>
HWY_INLINE void unroll(Fn&& fn) {
  [&]<std::size_t... i>(std::index_sequence<i...>) MOESAIC_LAMBDA { (fn(Index<i>{}), ...); }
  (std::make_index_sequence<n>{});
}

// ---- scalars of a block, broadcast

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2

HWY_INLINE V broadcast_first(__m128 v) {
#if HWY_TARGET <= HWY_AVX3
  return V{_mm512_broadcastss_ps(v)};
#else
  return V{_mm256_broadcastss_ps(v)};
#endif
}

HWY_INLINE V load_scale(const std::uint8_t* p) {
  std::uint16_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  return broadcast_first(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
}

HWY_INLINE void load_scale_pair(const std::uint8_t* p, V& d, V& m) {
  std::int32_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  const __m128 pair = _mm_cvtph_ps(_mm_cvtsi32_si128(bits));
  d = broadcast_first(pair);
  m = broadcast_first(_mm_movehdup_ps(pair));
}

#else

HWY_INLINE V load_scale(const std::uint8_t* p) {
  hwy::float16_t half;
  std::memcpy(&half, p, sizeof(half));
  const hn::CappedTag<float, 1> d1;
  return hn::Set(DF(), hn::GetLane(hn::PromoteTo(
                           d1, hn::Set(hn::Rebind<hwy::float16_t, decltype(d1)>(), half))));
}

HWY_INLINE void load_scale_pair(const std::uint8_t* p, V& d, V& m) {
  d = load_scale(p);
  m = load_scale(p + 2);
}

#endif

// ---- codes

/// kLanes bytes, each widened to a 32-bit lane.
HWY_INLINE VI load_bytes(const std::uint8_t* p) {
  return hn::PromoteTo(DI(), hn::LoadU(hn::Rebind<std::uint8_t, DI>(), p));
}

HWY_INLINE VI load_signed_bytes(const std::uint8_t* p) {
  return hn::PromoteTo(
      DI(), hn::LoadU(hn::Rebind<std::int8_t, DI>(), reinterpret_cast<const std::int8_t*>(p)));
}

/// Lane i is true where bit i of `bits` is set.
HWY_INLINE MI mask_from_bits(std::uint32_t bits) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  return MI{static_cast<__mmask16>(bits)};
#else
  const DI di;
  return hn::TestBit(hn::Set(di, static_cast<std::int32_t>(bits)),
                     hn::Shl(hn::Set(di, 1), hn::Iota(di, 0)));
#endif
}

// The values of the 16 levels of a four-bit block, (level + kBias)·d or level·d + m, and of the 32
// of a five-bit block, whose fifth bits come as a mask. Each product and sum is rounded on its own,
// as in dequantize_row.

#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3

/// With 16 lanes the levels are a register that a code looks up: scale and minimum cost one
/// operation per block instead of one per element. Only the low four bits of a code count.
template <int kBias, bool kHasMin>
class Levels {
 public:
  HWY_INLINE Levels(V d, V m) : table_(hn::Mul(hn::Iota(DF(), static_cast<float>(kBias)), d)) {
    if constexpr (kHasMin) table_ = hn::Add(table_, m);
  }
  HWY_INLINE V operator()(VI code) const { return V{_mm512_permutexvar_ps(code.raw, table_.raw)}; }

 private:
  V table_;
};

template <int kBias, bool kHasMin>
class Levels5 {
 public:
  HWY_INLINE Levels5(V d, V m) : low_(d, m), high_(d, m) {}
  HWY_INLINE V operator()(VI code, MI fifth) const {
    return hn::IfThenElse(hn::RebindMask(DF(), fifth), high_(code), low_(code));
  }

 private:
  Levels<kBias, kHasMin> low_;
  Levels<kBias + 16, kHasMin> high_;
};

#else

template <int kBias, bool kHasMin>
class Levels5 {
 public:
  HWY_INLINE Levels5(V d, V m) : d_(d), m_(m) {}
  HWY_INLINE V operator()(VI code, MI fifth) const {
    const VI sixteen = hn::IfThenElseZero(fifth, hn::Set(DI(), 16));
    return value(hn::Or(hn::And(code, hn::Set(DI(), 15)), sixteen));
  }

 protected:
  HWY_INLINE V value(VI level) const {
    if constexpr (kBias != 0) level = hn::Add(level, hn::Set(DI(), kBias));
    const V product = hn::Mul(hn::ConvertTo(DF(), level), d_);
    if constexpr (kHasMin) return hn::Add(product, m_);
    return product;
  }

 private:
  V d_;
  V m_;
};

/// Only the low four bits of a code count.
template <int kBias, bool kHasMin>
class Levels : private Levels5<kBias, kHasMin> {
 public:
  HWY_INLINE Levels(V d, V m) : Levels5<kBias, kHasMin>(d, m) {}
  HWY_INLINE V operator()(VI code) const { return this->value(hn::And(code, hn::Set(DI(), 15))); }
};

#endif

// ---- formats
//
// One struct per DType. Block reads what the kElems elements at p share; unpack(part, sink) calls
// sink(Index<j>, v) for each vector of the kPart elements from part · kPart on, v holding
// [j·kLanes, (j + 1)·kLanes) of them. The values are those of dequantize_row, bit for bit. The
// plain formats have a unit of 32 elements; the caller pads the tail of a row.

struct PackedF32 {
  static constexpr std::size_t kElems = 32, kBytes = 128, kPart = 32;
  struct Block {
    const std::uint8_t* p;
    HWY_INLINE explicit Block(const std::uint8_t* at) : p(at) {}
    template <class Sink>
    HWY_INLINE void unpack(std::size_t, Sink&& sink) const {
      unroll<32 / kLanes>([&](auto j) MOESAIC_LAMBDA {
        sink(j, hn::LoadU(DF(), reinterpret_cast<const float*>(p) + j * kLanes));
      });
    }
  };
};

struct PackedF16 {
  static constexpr std::size_t kElems = 32, kBytes = 64, kPart = 32;
  struct Block {
    const std::uint8_t* p;
    HWY_INLINE explicit Block(const std::uint8_t* at) : p(at) {}
    template <class Sink>
    HWY_INLINE void unpack(std::size_t, Sink&& sink) const {
      unroll<32 / kLanes>([&](auto j) MOESAIC_LAMBDA {
        const hn::Rebind<hwy::float16_t, DF> d16;
        sink(j, hn::PromoteTo(
                    DF(), hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(p) + j * kLanes)));
      });
    }
  };
};

struct PackedBF16 {
  static constexpr std::size_t kElems = 32, kBytes = 64, kPart = 32;
  struct Block {
    const std::uint8_t* p;
    HWY_INLINE explicit Block(const std::uint8_t* at) : p(at) {}
    template <class Sink>
    HWY_INLINE void unpack(std::size_t, Sink&& sink) const {
      unroll<32 / kLanes>([&](auto j) MOESAIC_LAMBDA {
        const hn::Rebind<std::uint16_t, DI> d16;
        const VI bits = hn::PromoteTo(
            DI(), hn::LoadU(d16, reinterpret_cast<const std::uint16_t*>(p) + j * kLanes));
        sink(j, hn::BitCast(DF(), hn::ShiftLeft<16>(bits)));
      });
    }
  };
};

/// 16 bytes of nibbles, elements 0–15 in the low halves and 16–31 in the high ones.
template <class Levels, class Sink>
HWY_INLINE void unpack_nibbles(const std::uint8_t* p, const Levels& levels, Sink&& sink) {
  unroll<kVectorsOf16>([&](auto j) MOESAIC_LAMBDA {
    const VI codes = load_bytes(p + j * kLanes);
    sink(Index<j>{}, levels(codes));
    sink(Index<j + kVectorsOf16>{}, levels(hn::ShiftRight<4>(codes)));
  });
}

struct PackedQ4_0 {
  static constexpr std::size_t kElems = 32, kBytes = 18, kPart = 32;
  struct Block {
    const std::uint8_t* p;
    HWY_INLINE explicit Block(const std::uint8_t* at) : p(at) {}
    template <class Sink>
    HWY_INLINE void unpack(std::size_t, Sink&& sink) const {
      const V d = load_scale(p);
      unpack_nibbles(p + 2, Levels<-8, false>(d, d), sink);
    }
  };
};

struct PackedQ4_1 {
  static constexpr std::size_t kElems = 32, kBytes = 20, kPart = 32;
  struct Block {
    const std::uint8_t* p;
    HWY_INLINE explicit Block(const std::uint8_t* at) : p(at) {}
    template <class Sink>
    HWY_INLINE void unpack(std::size_t, Sink&& sink) const {
      V d, m;
      load_scale_pair(p, d, m);
      unpack_nibbles(p + 4, Levels<0, true>(d, m), sink);
    }
  };
};

/// A word of fifth bits, bit i of element i, then nibbles as above.
template <class Levels5, class Sink>
HWY_INLINE void unpack_five_bits(const std::uint8_t* p, const Levels5& levels, Sink&& sink) {
  std::uint32_t fifth;
  std::memcpy(&fifth, p, sizeof(fifth));
  unroll<kVectorsOf16>([&](auto j) MOESAIC_LAMBDA {
    const VI codes = load_bytes(p + 4 + j * kLanes);
    sink(Index<j>{}, levels(codes, mask_from_bits(fifth >> (j * kLanes))));
    sink(Index<j + kVectorsOf16>{},
         levels(hn::ShiftRight<4>(codes), mask_from_bits(fifth >> (16 + j * kLanes))));
  });
}

struct PackedQ5_0 {
  static constexpr std::size_t kElems = 32, kBytes = 22, kPart = 32;
  struct Block {
    const std::uint8_t* p;
    HWY_INLINE explicit Block(const std::uint8_t* at) : p(at) {}
    template <class Sink>
    HWY_INLINE void unpack(std::size_t, Sink&& sink) const {
      const V d = load_scale(p);
      unpack_five_bits(p + 2, Levels5<-16, false>(d, d), sink);
    }
  };
};

struct PackedQ5_1 {
  static constexpr std::size_t kElems = 32, kBytes = 24, kPart = 32;
  struct Block {
    const std::uint8_t* p;
    HWY_INLINE explicit Block(const std::uint8_t* at) : p(at) {}
    template <class Sink>
    HWY_INLINE void unpack(std::size_t, Sink&& sink) const {
      V d, m;
      load_scale_pair(p, d, m);
      unpack_five_bits(p + 4, Levels5<0, true>(d, m), sink);
    }
  };
};

struct PackedQ8_0 {
  static constexpr std::size_t kElems = 32, kBytes = 34, kPart = 32;
  struct Block {
    const std::uint8_t* p;
    HWY_INLINE explicit Block(const std::uint8_t* at) : p(at) {}
    template <class Sink>
    HWY_INLINE void unpack(std::size_t, Sink&& sink) const {
      const V d = load_scale(p);
      unroll<32 / kLanes>([&](auto j) MOESAIC_LAMBDA {
        const VI codes = load_signed_bytes(p + 2 + j * kLanes);
        sink(j, hn::Mul(hn::ConvertTo(DF(), codes), d));
      });
    }
  };
};

/// Scales and negated minima of the eight sub-blocks of Q4_K and Q5_K: six bits each in 12 bytes,
/// 0–3 in the low bits of bytes 0–3 and 4–7; of 4–7 the low four bits in the nibbles of bytes 8–11,
/// the upper two on top of bytes 0–7. p is the block: d f16, d_min f16, the 12 bytes.
struct SubBlockScales {
  alignas(32) float scale[8];
  alignas(32) float minus_min[8];

  HWY_INLINE explicit SubBlockScales(const std::uint8_t* p) {
    std::uint32_t word[3];
    std::memcpy(word, p + 4, sizeof(word));
    const std::uint32_t codes[4] = {
        word[0] & 0x3f3f3f3fu,
        (word[2] & 0x0f0f0f0fu) | (word[0] >> 2 & 0x30303030u),
        word[1] & 0x3f3f3f3fu,
        (word[2] >> 4 & 0x0f0f0f0fu) | (word[1] >> 2 & 0x30303030u),
    };
    alignas(16) std::uint8_t bytes[16];
    std::memcpy(bytes, codes, sizeof(bytes));
    V d, m;
    load_scale_pair(p, d, m);
    const float d0 = hn::GetLane(d);
    const float m0 = -hn::GetLane(m);
    for (std::size_t i = 0; i < 8; ++i) scale[i] = d0 * static_cast<float>(bytes[i]);
    for (std::size_t i = 0; i < 8; ++i) minus_min[i] = m0 * static_cast<float>(bytes[8 + i]);
  }
};

/// Scales, then 32 bytes of nibbles for each two sub-blocks, low and high.
struct PackedQ4_K {
  static constexpr std::size_t kElems = 256, kBytes = 144, kPart = 64;
  struct Block {
    const std::uint8_t* p;
    SubBlockScales s;
    HWY_INLINE explicit Block(const std::uint8_t* at) : p(at), s(at) {}
    template <class Sink>
    HWY_INLINE void unpack(std::size_t part, Sink&& sink) const {
      const DF df;
      const std::uint8_t* q = p + 16 + 32 * part;
      const Levels<0, true> even(hn::Set(df, s.scale[2 * part]),
                                 hn::Set(df, s.minus_min[2 * part]));
      const Levels<0, true> odd(hn::Set(df, s.scale[2 * part + 1]),
                                hn::Set(df, s.minus_min[2 * part + 1]));
      unroll<32 / kLanes>([&](auto j) MOESAIC_LAMBDA {
        const VI codes = load_bytes(q + j * kLanes);
        sink(Index<j>{}, even(codes));
        sink(Index<32 / kLanes + j>{}, odd(hn::ShiftRight<4>(codes)));
      });
    }
  };
};

/// As Q4_K with 32 bytes of fifth bits before the nibbles: bit b of byte i is of element i of
/// sub-block b.
struct PackedQ5_K {
  static constexpr std::size_t kElems = 256, kBytes = 176, kPart = 64;
  struct Block {
    const std::uint8_t* p;
    SubBlockScales s;
    HWY_INLINE explicit Block(const std::uint8_t* at) : p(at), s(at) {}
    template <class Sink>
    HWY_INLINE void unpack(std::size_t part, Sink&& sink) const {
      const DF df;
      const DI di;
      const std::uint8_t* q = p + 48 + 32 * part;
      const VI even_bit = hn::Set(di, 1 << (2 * part));
      const VI odd_bit = hn::Set(di, 2 << (2 * part));
      const Levels5<0, true> even(hn::Set(df, s.scale[2 * part]),
                                  hn::Set(df, s.minus_min[2 * part]));
      const Levels5<0, true> odd(hn::Set(df, s.scale[2 * part + 1]),
                                 hn::Set(df, s.minus_min[2 * part + 1]));
      unroll<32 / kLanes>([&](auto j) MOESAIC_LAMBDA {
        const VI fifth = load_bytes(p + 16 + j * kLanes);
        const VI codes = load_bytes(q + j * kLanes);
        sink(Index<j>{}, even(codes, hn::TestBit(fifth, even_bit)));
        sink(Index<32 / kLanes + j>{}, odd(hn::ShiftRight<4>(codes), hn::TestBit(fifth, odd_bit)));
      });
    }
  };
};

/// 128 bytes of low nibbles, 64 of upper bit pairs, 16 signed sub-block scales, d. Each half of 128
/// elements is four groups of 32; a sub-block has 16 elements.
struct PackedQ6_K {
  static constexpr std::size_t kElems = 256, kBytes = 210, kPart = 128;
  struct Block {
    const std::uint8_t* p;
    alignas(64) float scale[16];
    HWY_INLINE explicit Block(const std::uint8_t* at) : p(at) {
      const float d = hn::GetLane(load_scale(p + 208));
      std::int8_t codes[16];
      std::memcpy(codes, p + 192, sizeof(codes));
      for (std::size_t i = 0; i < 16; ++i) scale[i] = d * static_cast<float>(codes[i]);
    }
    template <class Sink>
    HWY_INLINE void unpack(std::size_t half, Sink&& sink) const {
      const DF df;
      const DI di;
      unroll<32 / kLanes>([&](auto j) MOESAIC_LAMBDA {
        const VI high = load_bytes(p + 128 + 32 * half + j * kLanes);
        const VI low0 = load_bytes(p + 64 * half + j * kLanes);
        const VI low1 = load_bytes(p + 64 * half + 32 + j * kLanes);
        const auto emit = [&](auto group, VI low, VI pair) MOESAIC_LAMBDA {
          const VI level = hn::Or(hn::And(low, hn::Set(di, 15)), hn::And(pair, hn::Set(di, 48)));
          const V value = hn::ConvertTo(df, hn::Sub(level, hn::Set(di, 32)));
          sink(Index<group * 32 / kLanes + j>{},
               hn::Mul(value, hn::Set(df, scale[8 * half + 2 * group + j * kLanes / 16])));
        };
        emit(Index<0>{}, low0, hn::ShiftLeft<4>(high));
        emit(Index<1>{}, low1, hn::ShiftLeft<2>(high));
        emit(Index<2>{}, hn::ShiftRight<4>(low0), high);
        emit(Index<3>{}, hn::ShiftRight<4>(low1), hn::ShiftRight<2>(high));
      });
    }
  };
};

/// fn(Format{}) for the struct above that reads `dtype`.
template <class Fn>
HWY_INLINE void visit_format(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::F32:
      return fn(PackedF32{});
    case DType::F16:
      return fn(PackedF16{});
    case DType::BF16:
      return fn(PackedBF16{});
    case DType::Q4_0:
      return fn(PackedQ4_0{});
    case DType::Q4_1:
      return fn(PackedQ4_1{});
    case DType::Q5_0:
      return fn(PackedQ5_0{});
    case DType::Q5_1:
      return fn(PackedQ5_1{});
    case DType::Q8_0:
      return fn(PackedQ8_0{});
    case DType::Q4_K:
      return fn(PackedQ4_K{});
    case DType::Q5_K:
      return fn(PackedQ5_K{});
    case DType::Q6_K:
      return fn(PackedQ6_K{});
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
HWY_AFTER_NAMESPACE();
#endif  // vectors

#endif  // per-target include guard
