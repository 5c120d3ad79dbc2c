#include "tests/cudasim/exec/collective.h"
#include "tests/cudasim/exec/race.h"

namespace cudasim {
namespace {

constexpr u32 kNegated = 1, kAligned = 2;

u32 exited(const Block& b) {
  u32 bits = 0;
  for (const Warp& w : b.warps) bits |= w.live == 0 ? 1u << w.index : 0;
  return bits;
}

// Threads that an absent warp would have brought.
u32 population(const Block& b, u32 warps) {
  u32 n = 0;
  for_lanes(warps, [&](int i) {
    const u64 first = static_cast<u64>(i) * kLanes;
    n += static_cast<u32>(std::min<u64>(kLanes, b.launch->block.count() - first));
  });
  return n;
}

template <BarrierKind K>
Step barrier(Warp& w, const Ins& i, u32 mask) {
  if (mask == 0) return Step::Next;
  if (mask != w.live) return Step::Wait;  // the lanes of a warp come together
  Block& b = *w.block;
  const int lane = std::countr_zero(mask);
  if (w.lost != 0) {
    throw Fault{Finding::BarrierDivergence, lane,
                fmt::format("not all threads of the warp reach the barrier: lanes {:#010x} exit "
                            "instead",
                            w.lost)};
  }
  const u32 id = w.lanes<u32>(i.op[1])[lane];
  const u32 count = i.op[2] == kNowhere ? 0 : w.lanes<u32>(i.op[2])[lane];
  if (id >= b.barriers.size()) {
    throw Fault{Finding::BarrierDivergence, lane, fmt::format("barrier {} of 16", id)};
  }
  if (count % kLanes != 0) {
    throw Fault{Finding::BarrierDivergence, lane,
                fmt::format("barrier {} for {} threads, which is no multiple of 32", id, count)};
  }
  Barrier& bar = b.barriers[id];
  const u32 pc = static_cast<u32>(&i - w.code);
  if (bar.joined == 0) {
    bar.all_threads = count == 0;
    bar.expected = count == 0 ? static_cast<u32>(b.launch->block.count()) : count;
    bar.pc = pc;
  } else if ((count == 0) != bar.all_threads || (count != 0 && count != bar.expected)) {
    throw Fault{Finding::BarrierDivergence, lane,
                fmt::format("barrier {} is for {} threads here, and other warps wait at it for {}",
                            id, count == 0 ? b.launch->block.count() : count, bar.expected)};
  } else if (bar.all_threads && (i.flags & kAligned) != 0 && bar.pc != pc) {
    throw Fault{Finding::BarrierDivergence, lane,
                fmt::format("not all threads of the block reach the same barrier: others wait at "
                            "\"{}\" (PTX line {})",
                            b.launch->program->origins[bar.pc].text,
                            b.launch->program->origins[bar.pc].line)};
  }
  if ((bar.joined >> w.index & 1) != 0) {
    throw Fault{
        Finding::BarrierDivergence, lane,
        fmt::format("the warp comes to barrier {} again before the barrier is complete", id)};
  }
  bar.joined |= 1u << w.index;
  bar.arrived += population(b, 1u << w.index);
  if (K == BarrierKind::Popc || K == BarrierKind::And || K == BarrierKind::Or) {
    const u32 p = w.predicate(i.op[3]) ^ ((i.flags & kNegated) != 0 ? kAllLanes : 0);
    bar.population += static_cast<u32>(std::popcount(p & mask));
  }
  if (K == BarrierKind::Arrive) {
    complete_barriers(b);
    return Step::Next;
  }
  bar.waiting |= 1u << w.index;
  w.barrier = id;
  w.barrier_pc = pc;
  return Step::Block;
}

void store_result(Warp& w, const Barrier& bar, u32 threads) {
  const Ins& i = w.code[w.barrier_pc];
  if (i.op[0] == kNowhere) return;
  if (i.run == &barrier<BarrierKind::Popc>) {
    each(w.lanes<u32>(i.op[0]), w.active, [&](int) { return bar.population; });
  } else {
    const bool all = i.run == &barrier<BarrierKind::And>;
    const bool r = all ? bar.population == threads : bar.population > 0;
    w.set_predicate(i.op[0], r ? kAllLanes : 0, w.active);
  }
}

Step device_fence(Warp& w, const Ins&, u32 mask) {
  if (mask != 0) fence(w);
  return Step::Next;
}
Step block_fence(Warp&, const Ins&, u32) { return Step::Next; }

}  // namespace

void complete_barriers(Block& b) {
  const u32 gone = exited(b);
  for (Barrier& bar : b.barriers) {
    if (bar.joined == 0) continue;
    // Threads that have exited count as having come to a barrier of the whole block.
    const u32 absent = bar.all_threads ? population(b, gone & ~bar.joined) : 0;
    if (bar.arrived + absent < bar.expected) continue;
    u32 threads = 0;
    for_lanes(bar.waiting, [&](int i) {
      threads += static_cast<u32>(std::popcount(b.warps[static_cast<u32>(i)].live));
    });
    for_lanes(bar.waiting, [&](int i) {
      Warp& w = b.warps[static_cast<u32>(i)];
      store_result(w, bar, threads);
      w.waits = false;
    });
    sync_block(b, bar.joined, bar.waiting);
    bar = Barrier{};
  }
}

Handler barrier_handler(BarrierKind kind) {
  switch (kind) {
    case BarrierKind::Sync:
      return &barrier<BarrierKind::Sync>;
    case BarrierKind::Arrive:
      return &barrier<BarrierKind::Arrive>;
    case BarrierKind::Popc:
      return &barrier<BarrierKind::Popc>;
    case BarrierKind::And:
      return &barrier<BarrierKind::And>;
    case BarrierKind::Or:
      return &barrier<BarrierKind::Or>;
  }
  return nullptr;
}

Handler fence_handler(bool device_wide) { return device_wide ? &device_fence : &block_fence; }

}  // namespace cudasim
