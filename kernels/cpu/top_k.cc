#include "kernels/top_k.h"

#include <bit>
#include <cmath>
#include <limits>

#include "kernels/base/error.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/top_k.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace moesaic::kernels {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using FloatTag = hn::ScalableTag<float>;
using KeyTag = hn::ScalableTag<std::int32_t>;

// Signed keys that order as the scores do: NaN becomes −∞ and −0 becomes +0 first. They stay within
// ±0x7f800000 (the infinities), so that one more or less than a key never overflows.
HWY_INLINE std::int32_t key_of(float score) {
  const float s = (std::isnan(score) ? -std::numeric_limits<float>::infinity() : score) + 0.0f;
  const auto bits = std::bit_cast<std::int32_t>(s);
  return bits ^ (bits < 0 ? 0x7fffffff : 0);
}

HWY_INLINE hn::Vec<KeyTag> keys_of(hn::Vec<FloatTag> score) {
  const FloatTag df;
  const KeyTag di;
  const auto lowest = hn::Set(df, -std::numeric_limits<float>::infinity());
  const auto s = hn::Add(hn::IfThenElse(hn::IsNaN(score), lowest, score), hn::Zero(df));
  const auto bits = hn::BitCast(di, s);
  return hn::Xor(bits, hn::And(hn::BroadcastSignBit(bits), hn::Set(di, 0x7fffffff)));
}

// The smallest and the largest key.
struct KeyRange {
  std::int32_t low = std::numeric_limits<std::int32_t>::max();
  std::int32_t high = std::numeric_limits<std::int32_t>::min();
};

KeyRange make_keys(const float* scores, std::size_t n, std::int32_t* keys) {
  const FloatTag df;
  const KeyTag di;
  const std::size_t lanes = hn::Lanes(di);
  KeyRange range;
  std::size_t i = 0;
  if (n >= lanes) {
    auto low = hn::Set(di, range.low);
    auto high = hn::Set(di, range.high);
    for (; i + lanes <= n; i += lanes) {
      const auto key = keys_of(hn::LoadU(df, scores + i));
      low = hn::Min(low, key);
      high = hn::Max(high, key);
      hn::StoreU(key, di, keys + i);
    }
    range.low = hn::GetLane(hn::MinOfLanes(di, low));
    range.high = hn::GetLane(hn::MaxOfLanes(di, high));
  }
  for (; i < n; ++i) {
    keys[i] = key_of(scores[i]);
    range.low = HWY_MIN(range.low, keys[i]);
    range.high = HWY_MAX(range.high, keys[i]);
  }
  return range;
}

std::size_t count_at_least(const std::int32_t* keys, std::size_t n, std::int32_t bound) {
  const KeyTag di;
  const std::size_t lanes = hn::Lanes(di);
  const auto below = hn::Set(di, bound - 1);
  // Four counters, since one chain of additions would wait for itself. A mask is −1 where true.
  auto c0 = hn::Zero(di), c1 = c0, c2 = c0, c3 = c0;
  std::size_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    c0 = hn::Sub(c0, hn::VecFromMask(di, hn::Gt(hn::LoadU(di, keys + i), below)));
    c1 = hn::Sub(c1, hn::VecFromMask(di, hn::Gt(hn::LoadU(di, keys + i + lanes), below)));
    c2 = hn::Sub(c2, hn::VecFromMask(di, hn::Gt(hn::LoadU(di, keys + i + 2 * lanes), below)));
    c3 = hn::Sub(c3, hn::VecFromMask(di, hn::Gt(hn::LoadU(di, keys + i + 3 * lanes), below)));
  }
  for (; i + lanes <= n; i += lanes) {
    c0 = hn::Sub(c0, hn::VecFromMask(di, hn::Gt(hn::LoadU(di, keys + i), below)));
  }
  const auto sum = hn::SumOfLanes(di, hn::Add(hn::Add(c0, c1), hn::Add(c2, c3)));
  auto count = static_cast<std::size_t>(hn::GetLane(sum));
  for (; i < n; ++i) count += keys[i] >= bound ? 1 : 0;
  return count;
}

// Keeps, at the front of `keys`, those in [low, high]. Compress + StoreU writes a whole vector at
// or before the place it was read from, so that it never runs over keys that are still to be read.
std::size_t keep_between(std::int32_t* keys, std::size_t n, std::int32_t low, std::int32_t high) {
  const KeyTag di;
  const std::size_t lanes = hn::Lanes(di);
  const auto below = hn::Set(di, low - 1);
  const auto above = hn::Set(di, high + 1);
  std::size_t kept = 0;
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto key = hn::LoadU(di, keys + i);
    const auto inside = hn::And(hn::Gt(key, below), hn::Lt(key, above));
    hn::StoreU(hn::Compress(key, inside), di, keys + kept);
    kept += hn::CountTrue(di, inside);
  }
  for (; i < n; ++i) {
    const std::int32_t key = keys[i];
    keys[kept] = key;
    kept += key >= low && key <= high ? 1 : 0;
  }
  return kept;
}

// The k-th largest key, and how many of the k selected have exactly this key.
struct Threshold {
  std::int32_t key = 0;
  std::size_t n_equal = 0;
};

// Halves the interval of keys that must hold the threshold; the keys outside are dropped once they
// are at least half of those left, so that all passes together cost about two over n. (Scores of
// one sign and magnitude differ in low bits only, which is why the interval starts at their range.)
Threshold find_threshold(std::int32_t* keys, std::size_t n, std::size_t k, KeyRange range) {
  std::size_t n_kept = n;    // keys still stored
  std::size_t n_inside = n;  // of them, inside [low, high]
  std::size_t rank = k;      // the threshold is the rank-th largest inside
  std::int32_t low = range.low;
  std::int32_t high = range.high;
  std::size_t above = 0;  // stored keys > high
  while (low < high) {
    const auto middle = static_cast<std::int32_t>((std::int64_t{low} + high + 1) >> 1);
    const std::size_t upper = count_at_least(keys, n_kept, middle) - above;
    if (upper >= rank) {
      low = middle;
      n_inside = upper;
    } else {
      rank -= upper;
      n_inside -= upper;
      above += upper;
      high = middle - 1;
    }
    if (n_inside <= n_kept / 2) {
      n_kept = keep_between(keys, n_kept, low, high);
      above = 0;
    }
  }
  return {low, rank};
}

// Writes the ids of all keys above the threshold, and of the first n_equal at it.
void collect(const float* scores, std::size_t n, Threshold threshold, std::int32_t* ids,
             std::size_t k) {
  const FloatTag df;
  const KeyTag di;
  const std::size_t lanes = hn::Lanes(di);
  const auto bound = hn::Set(di, threshold.key);
  const auto below = hn::Set(di, threshold.key - 1);
  HWY_ALIGN std::int32_t tail[hn::MaxLanes(di)];
  std::size_t n_out = 0;
  std::size_t n_equal = threshold.n_equal;
  std::size_t i = 0;
  const auto one_by_one = [&](std::size_t end) {
    for (; i < end; ++i) {
      const std::int32_t key = key_of(scores[i]);
      if (key < threshold.key || (key == threshold.key && n_equal == 0)) continue;
      if (key == threshold.key) --n_equal;
      ids[n_out++] = static_cast<std::int32_t>(i);
    }
  };
  while (i + lanes <= n && n_out < k) {
    const auto key = keys_of(hn::LoadU(df, scores + i));
    const std::size_t equal_here = hn::CountTrue(di, hn::Eq(key, bound));
    if (equal_here > n_equal && n_equal > 0) {
      one_by_one(i + lanes);  // the last of the ties that are let in: once per call at most
      continue;
    }
    const auto chosen = hn::Gt(key, n_equal > 0 ? below : bound);
    n_equal -= n_equal > 0 ? equal_here : 0;
    const auto id = hn::Compress(hn::Iota(di, static_cast<std::int32_t>(i)), chosen);
    const std::size_t n_chosen = hn::CountTrue(di, chosen);
    if (n_out + lanes <= k) {
      hn::StoreU(id, di, ids + n_out);
    } else {
      hn::Store(id, di, tail);
      for (std::size_t j = 0; j < n_chosen; ++j) ids[n_out + j] = tail[j];
    }
    n_out += n_chosen;
    i += lanes;
  }
  if (n_out < k) one_by_one(n);
}

void top_k_impl(const float* scores, std::size_t n, std::int32_t* ids, std::size_t k,
                std::int32_t* keys) {
  const KeyRange range = make_keys(scores, n, keys);
  collect(scores, n, find_threshold(keys, n, k, range), ids, k);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moesaic::kernels {

HWY_EXPORT(top_k_impl);

void top_k(std::span<const float> scores, std::span<std::int32_t> ids,
           std::span<std::uint32_t> keys) {
  require<ShapeError>(ids.size() <= scores.size(), "top_k: k is {}, expected at most {} scores",
                      ids.size(), scores.size());
  require<ShapeError>(keys.size() == scores.size(), "top_k: scratch holds {} keys, expected {}",
                      keys.size(), scores.size());
  require<ShapeError>(scores.size() <= std::size_t{std::numeric_limits<std::int32_t>::max()},
                      "top_k: {} scores, expected at most 2^31 - 1", scores.size());
  if (ids.empty()) return;
  HWY_DYNAMIC_DISPATCH(top_k_impl)
  (scores.data(), scores.size(), ids.data(), ids.size(),
   reinterpret_cast<std::int32_t*>(keys.data()));
}

}  // namespace moesaic::kernels
#endif  // HWY_ONCE
