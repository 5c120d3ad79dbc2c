#pragma once

#include <span>
#include <string>

namespace cudasim {

/// What limits a kernel on a GPU, from its maker's data sheet.
struct Gpu {
  const char* name;
  double memory_bandwidth;  // bytes/s
  double tensor_flops;      // dense bf16 with float32 sums, flop/s
  double multiprocessors;
  double clock;  // Hz, boost
};

std::span<const Gpu> gpus();

/// What one kernel did, all its launches together.
struct CountedWork {
  double dram_bytes = 0;
  double tensor_flops = 0;
  double warp_instructions = 0;
  double shared_wavefronts = 0;
};

struct Bound {
  double seconds = 0;
  const char* by = "";  // what gives the bound: "memory", "tensor", "issue", "shared"
};

/// The least time that the counted work can take: the greatest of bytes over bandwidth, matrix
/// operations over their peak, warp instructions over 4 a clock and multiprocessor, and passes over
/// shared memory over one. Launch overhead, latency and dependences only add to it.
Bound bound_of(const CountedWork& work, const Gpu& gpu);

/// A table of bounds per kernel and GPU, from the file that --counters wrote. Throws Error.
std::string bounds_table(const std::string& file);

}  // namespace cudasim
