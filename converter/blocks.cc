#include "converter/blocks.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "kernels/base/error.h"

namespace moesaic::converter {
namespace {

constexpr int kPasses = 20;  // of changing places; SmolLM2's layers stop after about ten

// The group of each item, grown greedily.
std::vector<std::int64_t> grow(ConstMatrix affinity, std::int64_t size) {
  const std::int64_t n = affinity.rows;
  std::vector<std::int64_t> group(static_cast<std::size_t>(n), -1);
  const auto left = [&](std::int64_t i) { return group[static_cast<std::size_t>(i)] < 0; };
  std::vector<float> closeness(static_cast<std::size_t>(n));
  for (std::int64_t g = 0; g < n / size; ++g) {
    std::fill(closeness.begin(), closeness.end(), 0.0F);
    for (std::int64_t member = 0; member < size; ++member) {
      std::int64_t best = -1;
      for (std::int64_t i = 0; i < n; ++i) {
        if (left(i) && (best < 0 || closeness[static_cast<std::size_t>(i)] >
                                        closeness[static_cast<std::size_t>(best)])) {
          best = i;
        }
      }
      group[static_cast<std::size_t>(best)] = g;
      for (std::int64_t i = 0; i < n; ++i) {
        closeness[static_cast<std::size_t>(i)] += affinity.row(best)[i];
      }
    }
  }
  return group;
}

}  // namespace

std::vector<std::int32_t> balanced_groups(ConstMatrix affinity, std::int64_t size) {
  const std::int64_t n = affinity.rows;
  require<ShapeError>(affinity.cols == n && size >= 1 && n % size == 0,
                      "groups of {} among [{}, {}] affinities, expected a divisor of the rows and "
                      "as many columns",
                      size, n, affinity.cols);
  std::vector<std::int64_t> group = grow(affinity, size);
  const std::int64_t n_groups = n / size;
  // within[i, g] = Σ_{j∈g, j≠i} affinity[i, j], kept while items move.
  std::vector<double> within(static_cast<std::size_t>(n * n_groups));
  const auto sum = [&](std::int64_t i, std::int64_t g) -> double& {
    return within[static_cast<std::size_t>(i * n_groups + g)];
  };
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      if (j != i) sum(i, group[static_cast<std::size_t>(j)]) += affinity.row(i)[j];
    }
  }
  bool moved = n_groups > 1;
  for (int pass = 0; moved && pass < kPasses; ++pass) {
    moved = false;
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t from = group[static_cast<std::size_t>(i)];
      std::int64_t other = -1;
      double most = 1e-6;  // of affinities that may be rounded sums
      for (std::int64_t j = 0; j < n; ++j) {
        const std::int64_t to = group[static_cast<std::size_t>(j)];
        if (to == from) continue;
        const double gain =
            sum(i, to) + sum(j, from) - sum(i, from) - sum(j, to) - 2.0 * affinity.row(i)[j];
        if (gain > most) {
          most = gain;
          other = j;
        }
      }
      if (other < 0) continue;
      const std::int64_t to = group[static_cast<std::size_t>(other)];
      for (std::int64_t k = 0; k < n; ++k) {
        const double of_i = k == i ? 0 : affinity.row(k)[i];
        const double of_j = k == other ? 0 : affinity.row(k)[other];
        sum(k, from) += of_j - of_i;
        sum(k, to) += of_i - of_j;
      }
      std::swap(group[static_cast<std::size_t>(i)], group[static_cast<std::size_t>(other)]);
      moved = true;
    }
  }
  std::vector<std::int32_t> items(static_cast<std::size_t>(n));
  std::iota(items.begin(), items.end(), 0);
  std::stable_sort(items.begin(), items.end(), [&](std::int32_t a, std::int32_t b) {
    return group[static_cast<std::size_t>(a)] < group[static_cast<std::size_t>(b)];
  });
  return items;
}

}  // namespace moesaic::converter
