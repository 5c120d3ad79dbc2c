#pragma once

#include <vector>

#include "tests/cudasim/base.h"

namespace cudasim {

/// What one host thread counted of one launch. Sums over threads give the kernel's counters.
struct Tally {
  std::vector<u64> issued;  // by instruction: warp instructions with any lane
  std::vector<u64> lanes;   // by instruction: lanes they ran with

  struct Traffic {
    u64 requests = 0;       // warp instructions
    u64 sectors = 0;        // 32-byte sectors they touched
    u64 ideal_sectors = 0;  // sectors that the distinct bytes would fill
    u64 bytes = 0;          // bytes asked for, lanes counted singly
  };
  Traffic loads, stores;      // global memory
  u64 unique_read_bytes = 0;  // sectors read at least once in the launch × 32
  u64 unique_written_bytes = 0;
  u64 shared_requests = 0;
  u64 shared_wavefronts = 0;  // passes over the 32 banks
  u64 shared_ideal_wavefronts = 0;
  u64 local_bytes = 0;      // local memory, lanes counted singly
  u64 atomic_requests = 0;  // global and shared
  u64 atomic_lanes = 0;
  u64 atomic_same_address = 0;  // lanes that had to wait for another lane of their warp
  u64 mma_flops = 0;            // multiply-adds of mma, times two
  u64 async_copies = 0;         // cp.async, lanes counted singly
  u64 divergent_branches = 0;

  void add(const Tally& other);
};

}  // namespace cudasim
