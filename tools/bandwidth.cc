#include "tools/bandwidth.h"

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "kernels/base/aligned_buffer.h"

namespace moesaic::tools {
namespace {

constexpr std::size_t kBytes = std::size_t{512} << 20;
constexpr int kPasses = 5;

/// A reduction with eight independent sums: the loads are never waited for.
std::uint64_t read_all(const std::uint64_t* p, std::int64_t n) {
  std::uint64_t sums[8] = {};
  for (std::int64_t i = 0; i + 8 <= n; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += p[i + j];
  }
  std::uint64_t total = 0;
  for (const std::uint64_t s : sums) total += s;
  return total;
}

}  // namespace

double measure_read_bandwidth(ThreadPool& pool) {
  AlignedBuffer<std::uint64_t> buffer(kBytes / sizeof(std::uint64_t));
  const auto n = static_cast<std::int64_t>(buffer.size());
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    std::atomic<std::uint64_t> sink{0};
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](int thread) {
      const Range range = split(n, pool.n_threads(), thread, 8);
      sink.fetch_add(read_all(buffer.data() + range.begin, range.size()));
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    // The sum is of zeros; looking at it keeps the loads from being dropped.
    if (sink.load() == 0) best = std::max(best, static_cast<double>(kBytes) / elapsed.count());
  }
  return best;
}

}  // namespace moesaic::tools
