#pragma once

#include <cstdint>
#include <vector>

#include "kernels/base/view.h"

namespace moesaic::converter {

/// Splits n items into groups of `size` so that the affinities within groups add up to much: groups
/// grow one after the other from the first item that is left, each time by the item closest to
/// them, then pairs of items change places for as long as that helps. Returns the items group by
/// group.   affinity [n, n], symmetric; its diagonal does not count. `size` divides n (else
/// ShapeError). Deterministic.
std::vector<std::int32_t> balanced_groups(ConstMatrix affinity, std::int64_t size);

}  // namespace moesaic::converter
