#include "kernels/thresholds.h"

#include <bit>
#include <cmath>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/thresholds.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace moesaic::kernels {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using Tag = hn::CappedTag<float, 16>;
using Mask = hn::Mask<Tag>;

HWY_INLINE std::uint32_t bits_of(Mask mask) {
  std::uint8_t bytes[8] = {};
  hn::StoreMaskBits(Tag(), mask, bytes);
  std::uint32_t bits;
  std::memcpy(&bits, bytes, sizeof(bits));
  return bits;
}

HWY_INLINE Mask at_least(hn::Vec<Tag> v, const float* threshold) {
  return hn::Ge(hn::Abs(v), hn::LoadU(Tag(), threshold));
}

std::int64_t large(const float* x, const float* threshold, std::size_t n, float* kept,
                   std::uint32_t* marks) {
  const Tag d;
  const std::size_t lanes = hn::Lanes(d);
  std::int64_t count = 0;
  std::size_t i = 0;
  for (; i + 32 <= n; i += 32) {
    std::uint32_t bits = 0;
    for (std::size_t j = 0; j < 32; j += lanes) {
      const auto v = hn::LoadU(d, x + i + j);
      const auto mask = at_least(v, threshold + i + j);
      if (kept != nullptr) hn::StoreU(hn::IfThenElseZero(mask, v), d, kept + i + j);
      bits |= bits_of(mask) << j;
    }
    marks[i / 32] = bits;
    count += std::popcount(bits);
  }
  if (i == n) return count;
  std::uint32_t bits = 0;
  for (std::size_t j = 0; i + j < n; ++j) {
    const bool is_large = std::fabs(x[i + j]) >= threshold[i + j];
    if (kept != nullptr) kept[i + j] = is_large ? x[i + j] : 0.0f;
    bits |= std::uint32_t{is_large} << j;
  }
  marks[i / 32] = bits;
  return count + std::popcount(bits);
}

template <bool kGated>
NeuronCounts neurons(const float* a, const float* u, const float* gate, const float* hidden,
                     std::size_t n, float* h, std::uint32_t* marks) {
  const Tag d;
  const std::size_t lanes = hn::Lanes(d);
  NeuronCounts counts;
  std::size_t i = 0;
  for (; i + 32 <= n; i += 32) {
    std::uint32_t routed_bits = kGated ? 0 : ~std::uint32_t{0}, bits = 0;
    for (std::size_t j = 0; j < 32; j += lanes) {
      const auto v = hn::LoadU(d, a + i + j);
      const auto product = hn::Mul(v, hn::LoadU(d, u + i + j));
      auto mask = at_least(product, hidden + i + j);
      if constexpr (kGated) {
        const auto routed = at_least(v, gate + i + j);
        mask = hn::And(mask, routed);
        routed_bits |= bits_of(routed) << j;
      }
      hn::StoreU(hn::IfThenElseZero(mask, product), d, h + i + j);
      bits |= bits_of(mask) << j;
    }
    marks[i / 32] = bits;
    counts.routed += std::popcount(routed_bits);
    counts.kept += std::popcount(bits);
  }
  if (i == n) return counts;
  std::uint32_t bits = 0;
  for (std::size_t j = 0; i + j < n; ++j) {
    const bool routed = !kGated || std::fabs(a[i + j]) >= gate[i + j];
    const float product = a[i + j] * u[i + j];
    const bool kept = routed && std::fabs(product) >= hidden[i + j];
    h[i + j] = kept ? product : 0.0f;
    bits |= std::uint32_t{kept} << j;
    counts.routed += routed;
  }
  marks[i / 32] = bits;
  counts.kept += std::popcount(bits);
  return counts;
}

NeuronCounts gated_neurons(const float* a, const float* u, const float* gate, const float* hidden,
                           std::size_t n, float* h, std::uint32_t* marks) {
  return neurons<true>(a, u, gate, hidden, n, h, marks);
}

NeuronCounts all_neurons(const float* a, const float* u, const float* gate, const float* hidden,
                         std::size_t n, float* h, std::uint32_t* marks) {
  return neurons<false>(a, u, gate, hidden, n, h, marks);
}

template <bool kGated>
NeuronCounts slopes(const float* gate, const float* hidden, std::size_t n, float* a, float* u,
                    float* slope) {
  const Tag d;
  const std::size_t lanes = hn::Lanes(d);
  NeuronCounts counts;
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto v = hn::LoadU(d, a + i);
    const auto up = hn::LoadU(d, u + i);
    const auto product = hn::Mul(v, up);
    auto mask = at_least(product, hidden + i);
    if constexpr (kGated) {
      const auto routed = at_least(v, gate + i);
      counts.routed += static_cast<std::int64_t>(hn::CountTrue(d, routed));
      mask = hn::And(mask, routed);
    }
    counts.kept += static_cast<std::int64_t>(hn::CountTrue(d, mask));
    hn::StoreU(hn::IfThenElseZero(mask, hn::Mul(hn::LoadU(d, slope + i), up)), d, slope + i);
    hn::StoreU(hn::IfThenElseZero(mask, v), d, a + i);
    hn::StoreU(hn::IfThenElseZero(mask, product), d, u + i);
  }
  for (; i < n; ++i) {
    const bool routed = !kGated || std::fabs(a[i]) >= gate[i];
    const float product = a[i] * u[i];
    const bool kept = routed && std::fabs(product) >= hidden[i];
    counts.routed += kGated && routed;
    counts.kept += kept;
    slope[i] = kept ? slope[i] * u[i] : 0.0f;
    a[i] = kept ? a[i] : 0.0f;
    u[i] = kept ? product : 0.0f;
  }
  if constexpr (!kGated) counts.routed = static_cast<std::int64_t>(n);
  return counts;
}

NeuronCounts gated_slopes(const float* gate, const float* hidden, std::size_t n, float* a, float* u,
                          float* slope) {
  return slopes<true>(gate, hidden, n, a, u, slope);
}

NeuronCounts all_slopes(const float* gate, const float* hidden, std::size_t n, float* a, float* u,
                        float* slope) {
  return slopes<false>(gate, hidden, n, a, u, slope);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moesaic::kernels {

HWY_EXPORT(large);
HWY_EXPORT(gated_neurons);
HWY_EXPORT(all_neurons);
HWY_EXPORT(gated_slopes);
HWY_EXPORT(all_slopes);

std::int64_t keep_large(const float* x, const float* threshold, std::size_t n, float* kept,
                        std::uint32_t* marks) {
  return HWY_DYNAMIC_DISPATCH(large)(x, threshold, n, kept, marks);
}

NeuronCounts keep_neurons(const float* a, const float* u, const float* gate, const float* hidden,
                          std::size_t n, float* h, std::uint32_t* marks) {
  const auto run =
      gate == nullptr ? HWY_DYNAMIC_DISPATCH(all_neurons) : HWY_DYNAMIC_DISPATCH(gated_neurons);
  return run(a, u, gate, hidden, n, h, marks);
}

NeuronCounts keep_slopes(const float* gate, const float* hidden, std::size_t n, float* a, float* u,
                         float* slope) {
  const auto run =
      gate == nullptr ? HWY_DYNAMIC_DISPATCH(all_slopes) : HWY_DYNAMIC_DISPATCH(gated_slopes);
  return run(gate, hidden, n, a, u, slope);
}

}  // namespace moesaic::kernels
#endif  // HWY_ONCE
