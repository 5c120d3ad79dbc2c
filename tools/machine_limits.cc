#include "tools/machine_limits.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <fstream>

#include "kernels/base/context.h"
#include "kernels/linear.h"
#include "tools/statistics.h"

namespace moesaic::tools {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kReadBytes = std::size_t{256} << 20;
constexpr std::int64_t kWords = kReadBytes / sizeof(std::uint64_t);
constexpr int kReadPasses = 4;            // of a sample, about 40 ms
constexpr std::int64_t kGemmSize = 1024;  // 5 ms a product on two cores; 2048 gave no more
constexpr int kGemmPasses = 8;            // of a sample

template <class Fn>
double seconds_of(Fn&& fn) {
  const Clock::time_point start = Clock::now();
  fn();
  return std::chrono::duration<double>(Clock::now() - start).count();
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

MachineLimits::MachineLimits(ThreadPool& pool)
    : pool_(pool),
      memory_(kReadBytes),
      a_(kGemmSize * kGemmSize),
      b_(kGemmSize * kGemmSize),
      c_(kGemmSize * kGemmSize) {
  auto* words = reinterpret_cast<std::uint64_t*>(memory_.data());
  // Written first: pages that were only ever read are all the same page of zeros.
  pool_.run([&](int thread) {
    const Range range = split(kWords, pool_.n_threads(), thread, 16);
    std::memset(words + range.begin, 0,
                static_cast<std::size_t>(range.size()) * sizeof(std::uint64_t));
  });
  for (std::size_t i = 0; i < a_.size(); ++i) {
    a_[i] = static_cast<float>(i % 7) - 3;
    b_[i] = static_cast<float>(i % 5) - 2;
  }
  sample();  // the first is of cold code
  restart();
}

void MachineLimits::restart() {
  read_.clear();
  flops_.clear();
}

void MachineLimits::read_once() {
  const auto* words = reinterpret_cast<const std::uint64_t*>(memory_.data());
  std::atomic<std::uint64_t> sum{0};
  pool_.run([&](int thread) {
    const Range range = split(kWords, pool_.n_threads(), thread, 16);
    sum.fetch_add(read_all(words + range.begin, range.size()));
  });
  sink_ += sum.load();
}

void MachineLimits::sample() {
  const double read_seconds = seconds_of([&] {
    for (int pass = 0; pass < kReadPasses; ++pass) read_once();
  });
  // The sum is of zeros; looking at it keeps the loads from being dropped.
  read_.push_back(sink_ == 0 ? static_cast<double>(kReadBytes) * kReadPasses / read_seconds : 0);

  Tally tally;
  Context context{pool_, workspace_, tally, Activations::BF16};
  const auto square = [](AlignedBuffer<float>& m) {
    return Matrix(m.data(), kGemmSize, kGemmSize);
  };
  const double gemm_seconds = seconds_of([&] {
    for (int pass = 0; pass < kGemmPasses; ++pass) {
      kernels::gemm(context, false, false, 1, square(a_), square(b_), 0, square(c_));
    }
  });
  flops_.push_back(2.0 * kGemmSize * kGemmSize * kGemmSize * kGemmPasses / gemm_seconds);
}

double MachineLimits::read_bandwidth() const { return median(read_); }

std::pair<double, double> MachineLimits::read_range() const {
  const auto [low, high] = std::minmax_element(read_.begin(), read_.end());
  return {*low, *high};
}

double MachineLimits::peak_flops() const { return median(flops_); }

std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

}  // namespace moesaic::tools
