#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace moesaic::kernels {

/// One pair of keys that may be among the k best.
struct ProductCandidate {
  double score = 0;
  std::int32_t id = 0;
};

/// Most candidates that top_k_product() looks at for n keys a half: pairs of ranks (i, j) with
/// (i + 1)(j + 1) <= k.
std::size_t n_product_candidates(std::size_t n, std::size_t k);

/// Indices of the k largest sums first[a] + second[b], index a · n + b, in ascending index order.
/// Ties: the lower index wins. NaN counts as −∞. Both halves of the same length n, ids.size() = k
/// <= n². Exact: a pair whose ranks i and j in their halves have (i + 1)(j + 1) > k comes after k
/// others, so only the others are looked at (Lample et al., arXiv 1907.05242, take the k² pairs of
/// the k best keys of each half). Sums are compared in double. Scratch: `candidates` of
/// n_product_candidates(n, k), `values` of 2 n, `keys` of n, `ranks` of 2 min(n, k) elements.
/// Throws ShapeError. Single-threaded.
struct ProductScratch {
  std::span<ProductCandidate> candidates;
  std::span<float> values;
  std::span<std::uint32_t> keys;
  std::span<std::int32_t> ranks;
};
void top_k_product(std::span<const float> first, std::span<const float> second,
                   std::span<std::int32_t> ids, const ProductScratch& scratch);

}  // namespace moesaic::kernels
