#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <vector>

#include "tests/cudasim/code/program.h"
#include "tests/cudasim/exec/fault.h"
#include "tests/cudasim/exec/tally.h"
#include "tests/cudasim/memory/arena.h"
#include "tests/cudasim/memory/shared.h"

namespace cudasim {

struct Block;
struct Launch;

/// Lanes that are at the same instruction.
struct Fragment {
  u32 pc = 0;
  u32 mask = 0;
  bool waiting = false;  // at an instruction that names lanes which have not come
  u32 lost = 0;          // lanes that exited while it waited
};

/// A cp.async that has been issued: 32 lanes copy `bytes` each when it is waited for.
struct Copy {
  u32 mask = 0;
  u32 bytes = 0;
  std::array<u64, kLanes> from{};
  std::array<u32, kLanes> to{};      // shared-window addresses
  std::array<u32, kLanes> source{};  // bytes read; the rest is filled with zeros
  u32 group = 0;                     // cp.async.commit_group that closed it; see Warp::group
};

/// 32 lanes, run in lockstep where they are at the same instruction.
struct Warp {
  std::byte* base[2] = {nullptr, nullptr};  // registers, constants
  const Ins* code = nullptr;
  u32 pc = 0;
  u32 active = 0;                // lanes of the running fragment
  u32 live = 0;                  // lanes that have not exited
  u32 lost = 0;                  // lanes that exited while the running fragment waited for others
  u32 merge_pc = 0xffffffffu;    // where the running fragment meets the next other one
  std::vector<Fragment> others;  // not the running one
  u32 index = 0;                 // in its block
  u32 clock = 1;                 // of its memory accesses (exec/race.h)
  Block* block = nullptr;
  Launch* launch = nullptr;
  Tally* tally = nullptr;
  u64 fence_clock = 0;  // clock at the last fence.gpu; 0: none
  std::vector<Copy> copies;
  std::array<u32, kLanes> group{};  // committed groups, by lane
  bool waits = false;               // at a barrier of the block
  u32 barrier = 0;                  // number of the barrier it waits at
  u32 barrier_pc = 0;
  u64 started = 0;  // instructions since the block began, for %clock
  u32 spins = 0;    // branches backwards while other lanes wait
  u32 carry = 0;    // condition code CC.CF, by lane

  template <class T>
  T* lanes(Place p) const {
    return reinterpret_cast<T*>(base[p & 1] + (p & ~1u));
  }
  u32 predicate(Place p) const { return *lanes<u32>(p); }
  void set_predicate(Place p, u32 bits, u32 mask) const {
    u32& d = *lanes<u32>(p);
    d = (d & ~mask) | (bits & mask);
  }
  u32 thread(int lane) const { return index * kLanes + static_cast<u32>(lane); }
};

inline bool has_lane(u32 mask, int lane) { return (mask >> lane & 1) != 0; }

/// The lanes of a mask, lowest first.
template <class F>
void for_lanes(u32 mask, F f) {
  for (; mask != 0; mask &= mask - 1) f(std::countr_zero(mask));
}

/// d[lane] = f(lane) for the lanes of a mask.
template <class S, class F>
inline void each(S* d, u32 mask, F f) {
  if (mask == kAllLanes) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) d[l] = f(l);
  } else {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) {
      const S v = f(l);
      d[l] = (mask >> l & 1) != 0 ? v : d[l];
    }
  }
}

}  // namespace cudasim
