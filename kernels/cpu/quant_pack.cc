#include "kernels/quant.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/quant_pack.cc"
#include "hwy/foreach_target.h"  // compiles this file once per instruction set
// The namespace macros of highway.h belong to the target that foreach_target.h has just set.
#include "hwy/highway.h"
//
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/base/error.h"

HWY_BEFORE_NAMESPACE();
namespace moesaic::kernels {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

constexpr std::size_t kBlock = 32;  // elements of every block format written here
constexpr std::size_t kLanes = 8;   // partial sums, added up in one order on every target, so that
                                    // all write the same bytes

using Lanes = std::array<float, kLanes>;

HWY_INLINE float sum(const Lanes& a) {
  return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}

/// One block to be packed. z = x − origin, for exact sums (origin 0 for formats without minimum).
struct Block {
  alignas(64) std::array<float, kBlock> x;
  alignas(64) std::array<float, kBlock> w;
  alignas(64) std::array<float, kBlock> z;
  float origin = 0;
  float sum_w = 0, sum_wz = 0;
};

HWY_INLINE Block load_block(const float* x, const float* w, float origin) {
  Block b;
  b.origin = origin;
  float largest = 0;
  for (std::size_t i = 0; i < kBlock; ++i) largest = std::max(largest, w == nullptr ? 1.0f : w[i]);
  // Weights relative to the largest, so that no product over- or underflows; a block in which
  // nothing matters counts all elements alike.
  for (std::size_t i = 0; i < kBlock; ++i) {
    b.x[i] = x[i];
    b.w[i] = w == nullptr || largest == 0 ? 1.0f : w[i] / largest;
    b.z[i] = x[i] - origin;
  }
  Lanes sum_w{}, sum_wz{};
  for (std::size_t i = 0; i < kBlock; ++i) {
    sum_w[i % kLanes] += b.w[i];
    sum_wz[i % kLanes] += b.w[i] * b.z[i];
  }
  b.sum_w = sum(sum_w);
  b.sum_wz = sum(sum_wz);
  return b;
}

/// x ≈ d q + m, d and m being float16, and the sums that refitting them needs.
struct Fit {
  std::uint16_t d_bits = 0, m_bits = 0;
  float error = std::numeric_limits<float>::infinity();  // Σ w (x − (d q + m))²
  float wq = 0, wqq = 0, wqz = 0;                        // Σ w q, Σ w q², Σ w q z
};

/// The fit of d and m, rounded to float16, with each element on its nearest level q in [lo, hi].
/// Its error is infinite if d or m does not fit float16. `levels`, if not null, receives q.
template <int lo, int hi>
HWY_INLINE Fit fit_levels(const Block& b, float d_wanted, float m_wanted,
                          std::int32_t* levels = nullptr) {
  Fit fit;
  fit.d_bits = f32_to_f16(d_wanted);
  fit.m_bits = f32_to_f16(m_wanted);
  const float d = f16_to_f32(fit.d_bits);
  const float m = f16_to_f32(fit.m_bits);
  if (!std::isfinite(d) || !std::isfinite(m)) return fit;

  const hn::CappedTag<float, kLanes> f32;
  const hn::RebindToSigned<decltype(f32)> i32;
  const auto vd = hn::Set(f32, d);
  const auto vm = hn::Set(f32, m);
  const auto inverse = hn::Set(f32, d == 0 ? 0.0f : 1 / d);
  const auto v_lo = hn::Set(f32, static_cast<float>(lo));
  const auto v_hi = hn::Set(f32, static_cast<float>(hi));
  const auto to_positive = hn::Set(f32, 0.5f - lo);  // truncation then rounds to nearest
  Lanes error, wq, wqq, wqz;
  for (std::size_t l = 0; l < kLanes; l += hn::Lanes(f32)) {
    auto v_error = hn::Zero(f32), v_wq = v_error, v_wqq = v_error, v_wqz = v_error;
    for (std::size_t i = l; i < kBlock; i += kLanes) {
      const auto x = hn::Load(f32, &b.x[i]);
      const auto w = hn::Load(f32, &b.w[i]);
      const auto level = hn::Min(hn::Max(hn::Mul(hn::Sub(x, vm), inverse), v_lo), v_hi);
      const auto q_int = hn::Add(hn::ConvertTo(i32, hn::Add(level, to_positive)), hn::Set(i32, lo));
      if (levels != nullptr) hn::StoreU(q_int, i32, levels + i);
      const auto q = hn::ConvertTo(f32, q_int);
      const auto off = hn::Sub(x, hn::Add(hn::Mul(q, vd), vm));
      const auto w_q = hn::Mul(w, q);
      v_error = hn::Add(v_error, hn::Mul(w, hn::Mul(off, off)));
      v_wq = hn::Add(v_wq, w_q);
      v_wqq = hn::Add(v_wqq, hn::Mul(w_q, q));
      v_wqz = hn::Add(v_wqz, hn::Mul(w_q, hn::Load(f32, &b.z[i])));
    }
    hn::StoreU(v_error, f32, &error[l]);
    hn::StoreU(v_wq, f32, &wq[l]);
    hn::StoreU(v_wqq, f32, &wqq[l]);
    hn::StoreU(v_wqz, f32, &wqz[l]);
  }
  fit.error = sum(error);
  fit.wq = sum(wq);
  fit.wqq = sum(wqq);
  fit.wqz = sum(wqz);
  return fit;
}

/// Tries d and m, then the least-squares d and m for the levels that this gave, again and again
/// while that helps; keeps the best in `best`.
template <int lo, int hi, bool has_min>
HWY_INLINE void try_scale(const Block& b, float d, float m, Fit& best) {
  constexpr int kRounds = 4;
  // Refining only what starts close to the best so far: a quarter of the time, 1 % more error.
  constexpr float kHopeless = 1.1f;
  float before = std::numeric_limits<float>::infinity();
  for (int round = 0; round < kRounds; ++round) {
    const Fit fit = fit_levels<lo, hi>(b, d, m);
    if (fit.error < best.error) best = fit;
    if (fit.error > kHopeless * best.error || !(fit.error < before) || best.error == 0 ||
        fit.wqq == 0)
      return;
    before = fit.error;
    if constexpr (has_min) {
      const float determinant = b.sum_w * fit.wqq - fit.wq * fit.wq;
      if (!(determinant > 0)) return;
      d = (b.sum_w * fit.wqz - fit.wq * b.sum_wz) / determinant;
      m = b.origin + (b.sum_wz - d * fit.wq) / b.sum_w;
      // What rounding m to float16 shifts, d makes up for where it can.
      const float shift = b.origin - f16_to_f32(f32_to_f16(m));
      d = (fit.wqz + shift * fit.wq) / fit.wqq;
    } else {
      d = fit.wqz / fit.wqq;
    }
  }
}

/// Best x ≈ d q, q in [lo, hi]. The extreme element is put on each integer level near the ends, and
/// between them: a block that lies on a grid already is found again without loss.
template <int lo, int hi>
HWY_INLINE Fit fit_symmetric(const Block& b) {
  float extreme = 0;
  for (float x : b.x) extreme = std::abs(x) > std::abs(extreme) ? x : extreme;
  if (extreme == 0) return fit_levels<lo, hi>(b, 0, 0);
  Fit best;
  constexpr int kEnd = -lo;
  constexpr int kFirst = kEnd > 16 ? kEnd - 8 : 1;
  for (int level = kEnd; level >= kFirst && best.error > 0; --level) {
    for (const float sign : {-1.0f, 1.0f}) {
      try_scale<lo, hi, false>(b, extreme / (sign * static_cast<float>(level)), 0, best);
      if (4 * level >= 3 * kEnd) {
        try_scale<lo, hi, false>(b, extreme / (sign * (static_cast<float>(level) + 0.5f)), 0, best);
      }
    }
  }
  return best;
}

/// Best x ≈ d q + m, q in [0, hi].
template <int hi>
HWY_INLINE Fit fit_affine(const Block& b) {
  const float low = *std::min_element(b.x.begin(), b.x.end());
  const float high = *std::max_element(b.x.begin(), b.x.end());
  if (low == high) return fit_levels<0, hi>(b, 0, low);
  Fit best;
  // The data on `span` + 1 neighbouring levels from level `first` on: a block on a grid that does
  // not use the grid's ends is found again.
  for (int span = hi; span >= hi - 3; --span) {
    for (int first = 0; first <= hi - span && best.error > 0; ++first) {
      const float step = (high - low) / static_cast<float>(span);
      const float m = low - static_cast<float>(first) * step;
      const float m_read_back = f16_to_f32(f32_to_f16(m));
      const float d = (high - m_read_back) / static_cast<float>(first + span);
      try_scale<0, hi, true>(b, d, m, best);
    }
  }
  // Outliers at either end cut off.
  for (const float cut_low : {0.0f, 0.04f, 0.08f, 0.14f}) {
    for (const float cut_high : {0.0f, 0.04f, 0.08f, 0.14f}) {
      if (best.error == 0 || cut_low + cut_high == 0) continue;
      const float range = high - low;
      const float d = range * (1 - cut_low - cut_high) / static_cast<float>(hi);
      try_scale<0, hi, true>(b, d, low + cut_low * range, best);
    }
  }
  return best;
}

using Levels = std::array<std::int32_t, kBlock>;

HWY_INLINE void put_nibbles(const Levels& q, int bias, std::uint8_t* dst) {
  for (std::size_t j = 0; j < 16; ++j) {
    dst[j] = static_cast<std::uint8_t>(((q[j] + bias) & 15) | ((q[j + 16] + bias) & 15) << 4);
  }
}

HWY_INLINE void put_fifth_bits(const Levels& q, int bias, std::uint8_t* dst) {
  std::uint32_t bits = 0;
  for (std::size_t j = 0; j < kBlock; ++j) {
    bits |= static_cast<std::uint32_t>((q[j] + bias) >> 4 & 1) << j;
  }
  std::memcpy(dst, &bits, sizeof(bits));
}

/// The best fit of a block and its levels.
template <int lo, int hi, bool has_min>
HWY_INLINE Fit fit_block(const float* x, const float* w, Levels& q) {
  const Block b = load_block(x, w, has_min ? *std::min_element(x, x + kBlock) : 0.0f);
  Fit fit;
  if constexpr (has_min) {
    fit = fit_affine<hi>(b);
  } else {
    fit = fit_symmetric<lo, hi>(b);
  }
  fit_levels<lo, hi>(b, f16_to_f32(fit.d_bits), f16_to_f32(fit.m_bits), q.data());
  return fit;
}

/// Packs the block at x into dst; false if it does not fit the range of float16 scales.
bool pack_block(DType dtype, const float* x, const float* w, std::uint8_t* dst) {
  Levels q;
  Fit fit;
  switch (dtype) {
    case DType::Q4_0:
      fit = fit_block<-8, 7, false>(x, w, q);
      put_nibbles(q, 8, dst + 2);
      break;
    case DType::Q4_1:
      fit = fit_block<0, 15, true>(x, w, q);
      std::memcpy(dst + 2, &fit.m_bits, 2);
      put_nibbles(q, 0, dst + 4);
      break;
    case DType::Q5_0:
      fit = fit_block<-16, 15, false>(x, w, q);
      put_fifth_bits(q, 16, dst + 2);
      put_nibbles(q, 16, dst + 6);
      break;
    case DType::Q5_1:
      fit = fit_block<0, 31, true>(x, w, q);
      std::memcpy(dst + 2, &fit.m_bits, 2);
      put_fifth_bits(q, 0, dst + 4);
      put_nibbles(q, 0, dst + 8);
      break;
    default:  // Q8_0; level −128 stays unused: kernels may negate a level
      fit = fit_block<-127, 127, false>(x, w, q);
      for (std::size_t j = 0; j < kBlock; ++j) {
        dst[2 + j] = static_cast<std::uint8_t>(static_cast<std::int8_t>(q[j]));
      }
  }
  std::memcpy(dst, &fit.d_bits, 2);
  return std::isfinite(fit.error);
}

/// Packs n_blocks; returns the index of the first block that does not fit, n_blocks if all do.
std::int64_t pack(DType dtype, const float* x, const float* w, std::int64_t n_blocks,
                  std::uint8_t* dst) {
  const std::int64_t bytes = traits(dtype).block_bytes;
  for (std::int64_t i = 0; i < n_blocks; ++i) {
    const float* block_w = w == nullptr ? nullptr : w + i * kBlock;
    if (!pack_block(dtype, x + i * kBlock, block_w, dst + i * bytes)) return i;
  }
  return n_blocks;
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moesaic::kernels {
namespace {

HWY_EXPORT(pack);

void check_finite(DType dtype, std::span<const float> src) {
  const auto bad =
      std::find_if_not(src.begin(), src.end(), [](float v) { return std::isfinite(v); });
  require<FormatError>(bad == src.end(),
                       "cannot pack as {}: value {} of the row is {}, expected a "
                       "finite number",
                       traits(dtype).name, bad - src.begin(), bad == src.end() ? 0.0f : *bad);
}

void pack_f16(std::span<const float> src, std::byte* dst) {
  for (std::size_t i = 0; i < src.size(); ++i) {
    const std::uint16_t bits = f32_to_f16(src[i]);
    require<FormatError>((bits & 0x7fffu) < 0x7c00u,
                         "cannot pack as F16: value {} of the row is "
                         "{}, expected at most 65504",
                         i, src[i]);
    std::memcpy(dst + 2 * i, &bits, 2);
  }
}

void pack_bf16(std::span<const float> src, std::byte* dst) {
  for (std::size_t i = 0; i < src.size(); ++i) {
    const std::uint16_t bits = f32_to_bf16(src[i]);
    std::memcpy(dst + 2 * i, &bits, 2);
  }
}

}  // namespace

bool can_quantize(DType dtype) {
  return dtype != DType::Q4_K && dtype != DType::Q5_K && dtype != DType::Q6_K;
}

void quantize_row(DType dtype, std::span<const float> src, std::byte* dst,
                  std::span<const float> importance) {
  const DTypeTraits& t = traits(dtype);
  require<FormatError>(can_quantize(dtype),
                       "{} can be read, not written; expected F32, F16, BF16, "
                       "Q8_0, Q4_0, Q4_1, Q5_0 or Q5_1",
                       t.name);
  require<ShapeError>(static_cast<std::int64_t>(src.size()) % t.block_elems == 0,
                      "a {} row has {} elements, expected a multiple of {}", t.name, src.size(),
                      t.block_elems);
  require<ShapeError>(importance.empty() || importance.size() == src.size(),
                      "importance has {} values, expected {}", importance.size(), src.size());
  check_finite(dtype, src);
  for (std::size_t i = 0; i < importance.size(); ++i) {
    require<FormatError>(std::isfinite(importance[i]) && importance[i] >= 0,
                         "importance {} is {}, expected a number >= 0", i, importance[i]);
  }
  if (dtype == DType::F32) {
    if (!src.empty()) std::memcpy(dst, src.data(), src.size_bytes());
  } else if (dtype == DType::F16) {
    pack_f16(src, dst);
  } else if (dtype == DType::BF16) {
    pack_bf16(src, dst);
  } else {
    const std::int64_t n_blocks = static_cast<std::int64_t>(src.size()) / t.block_elems;
    const std::int64_t packed = HWY_DYNAMIC_DISPATCH(pack)(
        dtype, src.data(), importance.empty() ? nullptr : importance.data(), n_blocks,
        reinterpret_cast<std::uint8_t*>(dst));
    require<FormatError>(packed == n_blocks,
                         "cannot pack as {}: the scale of elements {} to {} is "
                         "beyond float16 (65504)",
                         t.name, packed * t.block_elems, (packed + 1) * t.block_elems - 1);
  }
}

}  // namespace moesaic::kernels
#endif  // HWY_ONCE
