#include "tests/cudasim/exec/race.h"

namespace cudasim {

bool ordered(const Warp& w, u32 thread, u32 tag, u32 entry) {
  const u32 clock = clock_of(entry);
  if (clock == 0) return true;
  Block& b = *w.block;
  const u32 by = thread_of(entry) / kLanes;
  if (tag == 0 || tag == b.tag) {
    if (clock == kInFlight) return false;
    if (tag != 0 && b.forgot) return true;
    if (thread_of(entry) == thread || clock <= b.base_clock) return true;
    return by == w.index ? clock < w.clock : b.knows(w.index, by) >= clock;
  }
  if (tag < w.launch->first_tag) return true;  // an earlier launch
  if (!w.launch->program->releases) return false;
  const std::lock_guard lock(w.launch->mutex);
  const auto found = w.launch->releases.find(tag);
  if (found == w.launch->releases.end()) return false;
  for (const auto& r : found->second) {
    if (r.ticket <= b.acquired && r.known[by] >= clock) return true;
  }
  return false;
}

void report_race(const Access& now, u32 tag, u32 entry, bool earlier_wrote, u64 word) {
  const Warp& w = *now.warp;
  const bool in_flight = clock_of(entry) == kInFlight && now.generic_shared;
  const bool other_block = tag != 0 && tag != w.block->tag;
  std::string who = fmt::format("thread {}", thread_of(entry));
  if (other_block) who += fmt::format(" of block {}", tag - w.launch->first_tag);
  const char* place = now.generic_shared ? "shared" : "global";
  if (in_flight) {
    throw Fault{Finding::AsyncRace, now.lane,
                fmt::format("{} shared address {:#x} ({} bytes) while the cp.async of {} may still "
                            "be writing it: wait_group and a barrier are missing",
                            now.write ? "writes" : "reads", now.address, now.bytes, who)};
  }
  std::string where = now.generic_shared ? fmt::format("shared address {:#x}", now.address)
                                         : w.launch->arena->describe(now.address);
  throw Fault{now.generic_shared ? Finding::SharedRace : Finding::GlobalRace, now.lane,
              fmt::format("{} {} memory ({} bytes; {}; word {:#x}) that {} {} with nothing that "
                          "orders the two{}",
                          now.write ? "writes" : "reads", place, now.bytes, where, word, who,
                          earlier_wrote ? "wrote" : "read",
                          !other_block && thread_of(entry) / kLanes == w.index
                              ? ": same warp, __syncwarp() is missing"
                          : other_block ? ""
                                        : ": a barrier is missing")};
}

void sync_warp(Warp& w) { w.clock = std::min(w.clock + 1, kLastClock); }

void sync_block(Block& b, u32 joined, u32 waiting) {
  const u32 n = static_cast<u32>(b.warps.size());
  u32 exited = 0;
  for (u32 i = 0; i < n; ++i) exited |= b.warps[i].live == 0 ? 1u << i : 0;
  const u32 everyone = n == 32 ? kAllLanes : (1u << n) - 1;
  if ((joined | exited) == everyone && (waiting | exited) == everyone) {
    u32 top = 0;
    for (const Warp& w : b.warps) top = std::max(top, w.clock);
    b.base_clock = top;
    if (top > kLastClock / 2) {  // begin again, with nothing to remember
      b.base_clock = top = 0;
      b.forgot = true;
      std::fill(b.shared.writer.begin(), b.shared.writer.end(), 0);
      for (auto& r : b.shared.reader) std::fill(r.begin(), r.end(), 0);
    }
    for (Warp& w : b.warps) w.clock = top + 1;
    std::fill(b.known.begin(), b.known.end(), top);
    return;
  }
  std::vector<u32> together(n, 0);
  for_lanes(joined, [&](int i) {
    for (u32 v = 0; v < n; ++v) {
      together[v] = std::max(together[v], b.knows(static_cast<u32>(i), v));
    }
    together[static_cast<u32>(i)] = b.warps[static_cast<u32>(i)].clock;
  });
  for_lanes(waiting, [&](int i) {
    for (u32 v = 0; v < n; ++v) {
      u32& k = b.knows(static_cast<u32>(i), v);
      k = std::max(k, together[v]);
    }
  });
  for_lanes(joined, [&](int i) { sync_warp(b.warps[static_cast<u32>(i)]); });
}

void fence(Warp& w) {
  w.fence_clock = w.clock;
  sync_warp(w);
}

void release(Warp& w) {
  if (w.fence_clock == 0) return;
  Launch& launch = *w.launch;
  const u32 n = static_cast<u32>(w.block->warps.size());
  std::vector<u32> known(n);
  for (u32 v = 0; v < n; ++v) known[v] = w.block->knows(w.index, v);
  known[w.index] = static_cast<u32>(w.fence_clock);
  const std::lock_guard lock(launch.mutex);
  launch.releases[w.block->tag].push_back({++launch.ticket, std::move(known)});
}

void acquire(Warp& w) {
  if (w.launch->program->releases) w.block->acquired = w.launch->ticket;
}

}  // namespace cudasim
