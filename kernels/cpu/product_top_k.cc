#include "kernels/product_top_k.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/base/error.h"
#include "kernels/top_k.h"

namespace moesaic::kernels {
namespace {

// Sums of what is left are finite, so that every pair has its place in the order.
float ordered(float score) {
  constexpr float kMost = std::numeric_limits<float>::max();
  return std::isnan(score) ? -kMost : std::clamp(score, -kMost, kMost);
}

// The ids of the `best.size()` largest values, largest first, the lower id of equals first.
void rank(std::span<const float> values, std::span<std::uint32_t> keys,
          std::span<std::int32_t> best) {
  top_k(values, best, keys);
  std::sort(best.begin(), best.end(), [&](std::int32_t a, std::int32_t b) {
    const float x = values[static_cast<std::size_t>(a)], y = values[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  });
}

}  // namespace

std::size_t n_product_candidates(std::size_t n, std::size_t k) {
  std::size_t sum = 0;
  for (std::size_t i = 0; i < std::min(n, k); ++i) sum += std::min(n, k / (i + 1));
  return sum;
}

void top_k_product(std::span<const float> first, std::span<const float> second,
                   std::span<std::int32_t> ids, const ProductScratch& scratch) {
  const std::size_t n = first.size();
  const std::size_t k = ids.size();
  require<ShapeError>(second.size() == n, "top_k_product: halves of {} and {} keys, expected equal",
                      n, second.size());
  constexpr auto kMostIds = static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max());
  require<ShapeError>(n == 0 || n <= kMostIds / n,
                      "top_k_product: {} keys a half, expected at most 46340", n);
  require<ShapeError>(k <= n * n, "top_k_product: k is {}, expected at most {} pairs", k, n * n);
  const std::size_t best = std::min(n, k);
  require<ShapeError>(scratch.candidates.size() == n_product_candidates(n, k) &&
                          scratch.values.size() == 2 * n && scratch.keys.size() == n &&
                          scratch.ranks.size() == 2 * best,
                      "top_k_product: scratch does not fit {} keys a half and k = {}", n, k);
  if (k == 0) return;
  const auto a = scratch.values.first(n), b = scratch.values.subspan(n);
  std::transform(first.begin(), first.end(), a.begin(), ordered);
  std::transform(second.begin(), second.end(), b.begin(), ordered);
  const auto best_a = scratch.ranks.first(best), best_b = scratch.ranks.subspan(best);
  rank(a, scratch.keys, best_a);
  rank(b, scratch.keys, best_b);
  ProductCandidate* to = scratch.candidates.data();
  for (std::size_t i = 0; i < best; ++i) {
    const auto id_a = static_cast<std::size_t>(best_a[i]);
    for (std::size_t j = 0; j < std::min(n, k / (i + 1)); ++j) {
      const auto id_b = static_cast<std::size_t>(best_b[j]);
      *to++ = {static_cast<double>(a[id_a]) + b[id_b], static_cast<std::int32_t>(id_a * n + id_b)};
    }
  }
  const auto end = scratch.candidates.begin() + static_cast<std::ptrdiff_t>(k);
  std::nth_element(scratch.candidates.begin(), end - 1, scratch.candidates.end(),
                   [](const ProductCandidate& x, const ProductCandidate& y) {
                     return x.score != y.score ? x.score > y.score : x.id < y.id;
                   });
  std::transform(scratch.candidates.begin(), end, ids.begin(),
                 [](const ProductCandidate& c) { return c.id; });
  std::sort(ids.begin(), ids.end());
}

}  // namespace moesaic::kernels
