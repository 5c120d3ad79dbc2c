#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/aligned_buffer.h"
#include "kernels/base/huge_buffer.h"
#include "kernels/base/thread_pool.h"
#include "kernels/base/workspace.h"

namespace moesaic::tools {

/// What the machine can do at most, by micro-benchmarks in this process with the same threads as
/// what is compared with it: a share of a limit means little if the limit was measured elsewhere,
/// or at another time. On a machine that others share, memory gives half as much one second as the
/// next; so the limits are sampled again and again between the measurements that they bound.
class MachineLimits {
 public:
  /// Throws IoError if the system does not give the memory, 256 MiB.
  explicit MachineLimits(ThreadPool& pool);

  /// One sample of each limit, about 0.1 s.
  void sample();
  /// Forgets all samples.
  void restart();

  /// Bytes per second that all threads together read from memory, median of the samples: passes
  /// over 256 MiB, far beyond any cache of the machines this is meant for. The buffer asks for huge
  /// pages: with pages of 4 KiB a virtual machine spends a third and more of the time on address
  /// translation (measured on two cores of a Zen 4: 15 GB/s against 26 GB/s), and what is to be
  /// measured is the memory.
  double read_bandwidth() const;
  /// The lowest and the highest sample.
  std::pair<double, double> read_range() const;

  /// FLOP/s of a product of two square matrices in bfloat16 with float32 sums (kernels::gemm) on
  /// all threads, a multiply-add counting two, median of the samples. What the hardware can do in
  /// kernels that are written, not its data sheet's figure; arithmetic in 8-bit integers may exceed
  /// it.
  double peak_flops() const;

 private:
  void read_once();

  ThreadPool& pool_;
  HugeBuffer memory_;
  AlignedBuffer<float> a_, b_, c_;  // [kGemmSize, kGemmSize]
  Workspace workspace_;
  std::vector<double> read_, flops_;
  std::uint64_t sink_ = 0;  // what keeps the loads from being dropped
};

/// "AMD EPYC 9B14", or "unknown".
std::string cpu_name();

}  // namespace moesaic::tools
