#pragma once

#include "tests/cudasim/exec/block.h"

namespace cudasim {

// Which access to a 4-byte word is ordered before which, in the way of FastTrack (Flanagan and
// Freund, PLDI 2009) with warps for threads: every warp has a clock, which moves on at what orders
// its accesses before those of others (a barrier, __syncwarp, a fence). A word's shadow holds its
// last writer and its last two readers (of different warps). An access is unordered with an earlier
// one if no chain of barriers leads from the clock of that one to the warp that accesses now.
//
// Shadow entry: thread (10 bits) | bytes of the word (4) | atomic (1) | clock (17). 0: nobody.

inline constexpr u32 kClockMask = (1u << 17) - 1;
inline constexpr u32 kInFlight = kClockMask;  // a cp.async is writing
inline constexpr u32 kLastClock = kClockMask - 1;
inline constexpr u32 kAtomicBit = 1u << 17;

inline u32 entry_of(u32 thread, u32 bytes, bool atomic, u32 clock) {
  return thread << 22 | bytes << 18 | (atomic ? kAtomicBit : 0) | clock;
}
inline u32 thread_of(u32 entry) { return entry >> 22; }
inline u32 bytes_of(u32 entry) { return entry >> 18 & 15; }
inline u32 clock_of(u32 entry) { return entry & kClockMask; }

/// The bytes of a word that [address, address + size) covers, as 4 bits. `word` = 4-byte aligned.
inline u32 byte_mask(u64 address, u64 size, u64 word) {
  const u64 first = address > word ? address - word : 0;
  const u64 last = std::min<u64>(address + size - word, 4);
  return (1u << last) - (1u << first);
}

struct Access {
  Warp* warp;
  int lane;
  u64 address;  // of the access
  u32 bytes;    // of the access
  bool write;
  bool atomic;
  bool generic_shared;  // shared memory: how a report names it
};

/// True if the earlier access `entry`, by a block with `tag` (0: this block), is ordered before
/// what `warp` does now, or by the same thread `thread`.
bool ordered(const Warp& warp, u32 thread, u32 tag, u32 entry);

/// Throws the Fault for a conflict with the earlier access `entry`.
[[noreturn]] void report_race(const Access& now, u32 tag, u32 entry, bool earlier_wrote, u64 word);

// What moves clocks.
void sync_warp(Warp& w);
/// All accesses of the warps in `joined` become ordered before what the warps in `waiting` do next.
void sync_block(Block& b, u32 joined, u32 waiting);
void fence(Warp& w);
/// After a fence, an atomic or volatile write lets other blocks see what came before the fence.
void release(Warp& w);
/// An atomic or volatile read: what was released so far is ordered before the block from now on.
void acquire(Warp& w);

}  // namespace cudasim
