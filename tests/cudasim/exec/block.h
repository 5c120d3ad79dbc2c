#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "tests/cudasim/exec/warp.h"

namespace cudasim {

struct Dim {
  u32 x = 1, y = 1, z = 1;
  u64 count() const { return static_cast<u64>(x) * y * z; }
};

/// What a fault looked like to the one who reads the report.
struct Report {
  Finding finding = Finding::Unsupported;
  std::string text;  // several lines
};

/// One run of a kernel: what all its blocks share.
struct Launch {
  const Program* program = nullptr;
  Arena* arena = nullptr;
  Dim grid, block;
  std::vector<std::byte> parameters;
  u64 dynamic_shared = 0;
  int device = 0;
  u32 places = 0;     // of the arena that the device may reach, as bits
  u32 id = 0;         // from 1, in the order of execution
  u32 first_tag = 0;  // of its blocks: block n has first_tag + n
  u64 seed = 0;       // 0: blocks and warps in order
  bool cooperative = false;
  u64 workspace = 0;         // where the blocks of a cooperative launch meet; 0: not one
  u64 max_instructions = 0;  // of a block, in warp instructions; 0: no limit
  struct HostRange {
    u64 base, size;
  };
  std::vector<HostRange> registered;  // by cudaHostRegister: reachable, without shadow

  std::atomic<bool> stop{false};
  std::atomic<u64> turns{0};    // of cooperative blocks that did more than sleep
  std::atomic<int> n_awake{0};  // host threads that have such blocks, or may have
  std::mutex mutex;
  std::unique_ptr<Report> report;  // the first fault
  std::string output;              // of printf

  // Fences make writes of one block visible to another that sees a later atomic (exec/race.h).
  struct Release {
    u64 ticket;
    std::vector<u32> known;  // by warp: clock up to which its accesses are ordered before
  };
  std::atomic<u64> ticket{0};
  std::unordered_map<u32, std::vector<Release>> releases;  // by tag

  u64 shared_bytes() const { return program->static_shared + dynamic_shared; }
  u32 warps() const { return static_cast<u32>((block.count() + kLanes - 1) / kLanes); }
};

/// A named barrier of a block.
struct Barrier {
  u32 expected = 0;  // threads, 0: nobody has come
  u32 arrived = 0;
  u32 waiting = 0;     // warps, as bits
  u32 joined = 0;      // warps that came or only arrived, as bits
  u32 pc = 0;          // where the first warp came
  u32 population = 0;  // barrier.red: threads whose predicate holds
  bool all_threads = true;
};

struct Block {
  Launch* launch = nullptr;
  Dim index;
  u64 linear = 0;
  u32 tag = 0;
  std::vector<Warp> warps;
  SharedMemory shared;
  std::array<Barrier, 16> barriers;
  std::vector<std::byte> local;  // [thread][local_bytes]

  // Happens-before of memory accesses (exec/race.h).
  u32 base_clock = 0;      // accesses up to this clock are ordered before everything now
  std::vector<u32> known;  // [warp][warp]: accesses of the second that are ordered before the first
  bool forgot = false;     // clocks began again: entries in global memory mean nothing
  u64 acquired = 0;        // last ticket that an atomic of the block may have seen

  std::mt19937_64 random;
  u64 instructions = 0;
  bool asleep = false;  // its only warp that does not wait at a barrier ended the last run so
  std::unique_ptr<std::byte[]> storage;  // registers of all warps
  std::size_t storage_bytes = 0;

  u32& knows(u32 warp, u32 of) { return known[warp * warps.size() + of]; }

  /// Makes the block ready to run; buffers are used again.
  void start(Launch& l, u64 block_index, Tally& tally);
  /// Runs until every warp has exited, or, with `slice` not 0, for about that many warp
  /// instructions; less if a block of a cooperative launch sleeps. True when done. Throws Fault
  /// after filling `where`.
  bool run(u64 slice, std::string& where);
};

/// "kernel k<float>, block (1,0,0), thread (5,0,0), PTX line 12: …; file.cu:7"
std::string describe_place(const Block& b, const Warp& w, const Fault& fault);

}  // namespace cudasim
