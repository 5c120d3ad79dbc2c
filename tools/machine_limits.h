#pragma once

#include <string>

#include "kernels/base/thread_pool.h"

namespace moesaic::tools {

/// What the machine can do at most, by micro-benchmarks in this process with the same threads as
/// what is compared with it: a share of a limit means little if the limit was measured elsewhere.
struct MachineLimits {
  double read_bandwidth = 0;  // bytes/s
  double peak_flops = 0;      // FLOP/s
};

/// Both of the below; they take half a second to two seconds.
MachineLimits measure_machine_limits(ThreadPool& pool);

/// Bytes per second that all threads of the pool together read from memory: the best of a few
/// passes over 512 MiB, far beyond any cache of the machines this is meant for. The buffer asks for
/// huge pages: with pages of 4 KiB a virtual machine spends a third and more of the time on address
/// translation (measured on two cores of a Zen 4: 15 GB/s against 26 GB/s), and what is to be
/// measured is the memory. Throws IoError if the system does not give the memory.
double measure_read_bandwidth(ThreadPool& pool);

/// FLOP/s of a product of two square matrices in bfloat16 with float32 sums (kernels::gemm) on all
/// threads of the pool, a multiply-add counting two: the best of a few. What the hardware can do in
/// kernels that are written, not its data sheet's figure; arithmetic in 8-bit integers may exceed
/// it.
double measure_peak_flops(ThreadPool& pool);

/// "AMD EPYC 9B14", or "unknown".
std::string cpu_name();

}  // namespace moesaic::tools
