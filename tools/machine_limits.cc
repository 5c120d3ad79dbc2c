#include "tools/machine_limits.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <fstream>

#include "kernels/base/aligned_buffer.h"
#include "kernels/base/context.h"
#include "kernels/base/huge_buffer.h"
#include "kernels/linear.h"

namespace moesaic::tools {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kReadBytes = std::size_t{512} << 20;
constexpr int kReadPasses = 10;
constexpr std::int64_t kGemmSize = 1024;  // 5 ms a product on two cores; 2048 gave no more
constexpr int kGemmPasses = 20;

constexpr double kEnough = 1;  // seconds after which a slow machine makes no further pass

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Seconds of the fastest of up to n_passes calls.
template <class Fn>
double fastest(int n_passes, Fn&& fn) {
  const Clock::time_point begin = Clock::now();
  double best = 0;
  for (int pass = 0; pass < n_passes && seconds_since(begin) < kEnough; ++pass) {
    const Clock::time_point start = Clock::now();
    fn();
    const double seconds = seconds_since(start);
    if (pass == 0 || seconds < best) best = seconds;
  }
  return best;
}

/// A reduction with sixteen independent sums: the loads are never waited for.
std::uint64_t read_all(const std::uint64_t* p, std::int64_t n) {
  std::uint64_t sums[16] = {};
  for (std::int64_t i = 0; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; ++j) sums[j] += p[i + j];
  }
  std::uint64_t total = 0;
  for (const std::uint64_t s : sums) total += s;
  return total;
}

}  // namespace

MachineLimits measure_machine_limits(ThreadPool& pool) {
  return {measure_read_bandwidth(pool), measure_peak_flops(pool)};
}

double measure_read_bandwidth(ThreadPool& pool) {
  HugeBuffer memory(kReadBytes);
  auto* words = reinterpret_cast<std::uint64_t*>(memory.data());
  constexpr std::int64_t kWords = kReadBytes / sizeof(std::uint64_t);
  // Written first: pages that were only ever read are all the same page of zeros.
  pool.run([&](int thread) {
    const Range range = split(kWords, pool.n_threads(), thread, 16);
    std::memset(words + range.begin, 0,
                static_cast<std::size_t>(range.size()) * sizeof(std::uint64_t));
  });
  std::uint64_t sink = 0;
  const double seconds = fastest(kReadPasses, [&] {
    std::atomic<std::uint64_t> sum{0};
    pool.run([&](int thread) {
      const Range range = split(kWords, pool.n_threads(), thread, 16);
      sum.fetch_add(read_all(words + range.begin, range.size()));
    });
    sink |= sum.load();
  });
  // The sum is of zeros; looking at it keeps the loads from being dropped.
  return sink == 0 ? static_cast<double>(kReadBytes) / seconds : 0;
}

double measure_peak_flops(ThreadPool& pool) {
  Workspace workspace;
  Tally tally;
  Context context{pool, workspace, tally, Activations::BF16};
  constexpr auto kElements = static_cast<std::size_t>(kGemmSize * kGemmSize);
  AlignedBuffer<float> a(kElements), b(kElements), c(kElements);
  for (std::size_t i = 0; i < kElements; ++i) {
    a[i] = static_cast<float>(i % 7) - 3;
    b[i] = static_cast<float>(i % 5) - 2;
  }
  const double seconds = fastest(kGemmPasses, [&] {
    kernels::gemm(context, false, false, 1, ConstMatrix(a.data(), kGemmSize, kGemmSize),
                  ConstMatrix(b.data(), kGemmSize, kGemmSize), 0,
                  Matrix(c.data(), kGemmSize, kGemmSize));
  });
  return 2.0 * kGemmSize * kGemmSize * kGemmSize / seconds;
}

std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

}  // namespace moesaic::tools
