#pragma once

#include <cstdint>
#include <span>

namespace moesaic::kernels {

/// Indices of the k largest scores, in ascending index order. Ties: the lower index wins. NaN
/// counts as −∞. 0 <= k <= scores.size(), ids.size() == k. `keys` is scratch of scores.size()
/// elements. By threshold: a radix search for the k-th largest key, then one pass that collects; no
/// sort. Throws ShapeError. Single-threaded.
void top_k(std::span<const float> scores, std::span<std::int32_t> ids,
           std::span<std::uint32_t> keys);

}  // namespace moesaic::kernels
