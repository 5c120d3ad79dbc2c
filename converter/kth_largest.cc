#include "converter/kth_largest.h"

#include <bit>
#include <vector>

#include "kernels/base/error.h"

namespace moesaic::converter {
namespace {

constexpr std::int64_t kBins = 1 << 16;

// How many values fall into each of the bins that bin(bits) names; below 0: none.
template <class Bin>
std::vector<std::uint32_t> count(Context& ctx, std::span<const float> values, Bin&& bin) {
  const int n_threads = ctx.pool.n_threads();
  std::vector<std::uint32_t> counts(static_cast<std::size_t>(n_threads * kBins));
  ctx.pool.run([&](int thread) {
    std::uint32_t* own = counts.data() + thread * kBins;
    const Range range = split(static_cast<std::int64_t>(values.size()), n_threads, thread);
    for (std::int64_t i = range.begin; i < range.end; ++i) {
      const std::int64_t b = bin(std::bit_cast<std::uint32_t>(values[static_cast<std::size_t>(i)]));
      if (b >= 0) ++own[b];
    }
  });
  for (std::size_t b = static_cast<std::size_t>(kBins); b < counts.size(); ++b) {
    counts[b % static_cast<std::size_t>(kBins)] += counts[b];
  }
  return counts;
}

// The bin of the k-th largest value; k becomes its place within.
std::uint32_t find(std::span<const std::uint32_t> counts, std::int64_t& k) {
  std::uint32_t b = kBins;
  do {
    --b;
    k -= counts[b];
  } while (k > 0);
  k += counts[b];
  return b;
}

}  // namespace

// The bits of floats >= 0 are ordered as the floats are: the upper half of the bits first.
float kth_largest(Context& ctx, std::span<const float> values, std::int64_t k) {
  require<InputError>(k >= 1 && k <= static_cast<std::int64_t>(values.size()),
                      "k-th largest of {} values: k is {}", values.size(), k);
  const auto upper = find(
      count(ctx, values, [](std::uint32_t bits) { return std::int64_t{bits >> 16 & 0xffff}; }), k);
  const auto lower = find(count(ctx, values,
                                [upper](std::uint32_t bits) {
                                  return bits >> 16 == upper ? std::int64_t{bits & 0xffff} : -1;
                                }),
                          k);
  return std::bit_cast<float>(upper << 16 | lower);
}

}  // namespace moesaic::converter
