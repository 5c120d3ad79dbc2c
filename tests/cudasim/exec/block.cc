#include "tests/cudasim/exec/block.h"

#include <algorithm>

#include "tests/cudasim/exec/collective.h"

namespace cudasim {
namespace {

u32 lane_mask(u64 threads, u32 warp) {
  const u64 first = static_cast<u64>(warp) * kLanes;
  const u64 n = std::min<u64>(kLanes, threads - first);
  return n == kLanes ? kAllLanes : (1u << n) - 1;
}

void preset(Block& b, Warp& w, const Program::Preset& p) {
  const Launch& l = *b.launch;
  const auto fill = [&](auto f) {
    if (p.wide) {
      each(w.lanes<u64>(p.at), kAllLanes, [&](int lane) { return static_cast<u64>(f(lane)); });
    } else {
      each(w.lanes<u32>(p.at), kAllLanes, [&](int lane) { return static_cast<u32>(f(lane)); });
    }
  };
  const auto all = [&](u64 v) { fill([=](int) { return v; }); };
  const Dim d = l.block;
  switch (p.what) {
    case Special::TidX:
      return fill([&](int k) { return w.thread(k) % d.x; });
    case Special::TidY:
      return fill([&](int k) { return w.thread(k) / d.x % d.y; });
    case Special::TidZ:
      return fill([&](int k) { return w.thread(k) / (d.x * d.y); });
    case Special::NtidX:
      return all(d.x);
    case Special::NtidY:
      return all(d.y);
    case Special::NtidZ:
      return all(d.z);
    case Special::CtaidX:
      return all(b.index.x);
    case Special::CtaidY:
      return all(b.index.y);
    case Special::CtaidZ:
      return all(b.index.z);
    case Special::NctaidX:
      return all(l.grid.x);
    case Special::NctaidY:
      return all(l.grid.y);
    case Special::NctaidZ:
      return all(l.grid.z);
    case Special::LaneId:
      return fill([](int k) { return k; });
    case Special::WarpId:
      return all(w.index);
    case Special::NwarpId:
      return all(b.warps.size());
    case Special::SmId:
      return all(0);
    case Special::NsmId:
      return all(1);
    case Special::GridId:
      return all(l.id);
    case Special::LaneMaskEq:
      return fill([](int k) { return 1u << k; });
    case Special::LaneMaskLt:
      return fill([](int k) { return (1u << k) - 1; });
    case Special::LaneMaskLe:
      return fill([](int k) { return (2ull << k) - 1; });
    case Special::LaneMaskGt:
      return fill([](int k) { return ~((2ull << k) - 1); });
    case Special::LaneMaskGe:
      return fill([](int k) { return ~((1u << k) - 1); });
    case Special::DynamicSharedSize:
      return all(l.dynamic_shared);
    case Special::TotalSharedSize:
      return all(l.shared_bytes());
    case Special::WorkspaceHigh:
      return all(l.workspace >> 32);
    case Special::WorkspaceLow:
      return all(l.workspace & 0xffffffffu);
  }
}

// What the waiting warps of a block that cannot go on wait for.
[[noreturn]] void stuck(const Block& b, std::string& where) {
  std::string text = "no warp of the block can go on:";
  const Warp* first = nullptr;
  for (const Warp& w : b.warps) {
    if (w.live == 0) {
      text += fmt::format("\n    warp {} has exited", w.index);
      continue;
    }
    const auto& at = b.launch->program->origins[w.barrier_pc];
    text += fmt::format("\n    warp {} waits at \"{}\" (PTX line {}{}{})", w.index, at.text,
                        at.line, at.source.line == 0 ? "" : ", ",
                        b.launch->program->module->describe(at.source));
    if (first == nullptr) first = &w;
  }
  const Fault fault{Finding::BarrierDivergence, -1, text};
  Warp at = *first;
  at.pc = at.barrier_pc;
  where = describe_place(b, at, fault);
  throw fault;
}

// Lanes wait for others of their warp that can no longer come.
[[noreturn]] void never_come(Warp& w) {
  u32 waiting = 0;
  std::string text;
  for (const Fragment& f : w.others) {
    waiting |= f.mask;
    const auto& at = w.launch->program->origins[f.pc];
    text += fmt::format("\n    lanes {:#010x} at \"{}\" (PTX line {})", f.mask, at.text, at.line);
  }
  const Fragment first = w.others.front();
  w.pc = first.pc;
  const Kind kind = w.launch->program->origins[first.pc].kind;
  const bool barrier = kind == Kind::Barrier;
  throw Fault{barrier ? Finding::BarrierDivergence : Finding::WarpMask,
              std::countr_zero(first.mask),
              fmt::format("{}: lanes wait for lanes that never come:{}",
                          barrier ? "not all threads of the warp reach the barrier"
                                  : "the member mask names lanes that do not execute it",
                          text)};
}

// Runs one warp for at most `budget` instructions.
Step run_warp(Warp& w, u64 budget) {
  u64* const issued = w.tally->issued.data();
  u64* const lanes = w.tally->lanes.data();
  const Ins* const code = w.code;
  u64 left = budget;
  Step step = Step::Next;
  while (left-- > 0) {
    const u32 pc = w.pc;
    const Ins& i = code[pc];
    u32 mask = w.active;
    if (i.guard != kNowhere) {
      const u32 p = w.predicate(i.guard);
      mask &= i.guard_negated ? ~p : p;
    }
    ++issued[pc];
    lanes[pc] += static_cast<u64>(std::popcount(mask));
    step = mask != 0 || i.control ? i.run(w, i, mask) : Step::Next;
    if (step == Step::Jump) continue;
    if (step == Step::Done) break;
    if (step == Step::Wait) {
      --issued[pc];
      lanes[pc] -= static_cast<u64>(std::popcount(mask));
      const u32 rest = w.active & ~mask;
      put_aside(w, pc, mask, true);
      if (rest != 0) put_aside(w, pc + 1, rest, false);
      if (!switch_fragment(w)) never_come(w);
      continue;
    }
    w.lost = 0;
    if (++w.pc == w.merge_pc) {
      put_aside(w, w.pc, w.active, false);
      switch_fragment(w);
    }
    if (step != Step::Next) break;
  }
  w.started += budget - left;
  w.block->instructions += budget - left;
  return step == Step::Block || step == Step::Done || step == Step::Sleep ? step : Step::Yield;
}

}  // namespace

void Block::start(Launch& l, u64 block_index, Tally& tally) {
  const Program& p = *l.program;
  launch = &l;
  linear = block_index;
  index = {static_cast<u32>(block_index % l.grid.x),
           static_cast<u32>(block_index / l.grid.x % l.grid.y),
           static_cast<u32>(block_index / (static_cast<u64>(l.grid.x) * l.grid.y))};
  tag = l.first_tag + static_cast<u32>(block_index);
  base_clock = 0;
  forgot = false;
  acquired = 0;
  instructions = 0;
  barriers.fill({});
  random.seed(l.seed * 0x9e3779b97f4a7c15ull + block_index);
  const u32 n = l.warps();
  known.assign(static_cast<std::size_t>(n) * n, 0);
  shared.reset(l.shared_bytes());
  for (const auto& [offset, bytes] : p.shared_gaps) {
    std::memset(shared.written.data() + offset, 2, bytes);
  }
  local.assign(p.local_bytes * l.block.count(), std::byte{0xff});
  const std::size_t needed = p.register_bytes * n + 64;
  if (needed > storage_bytes) {
    storage = std::make_unique<std::byte[]>(needed);
    storage_bytes = needed;
  }
  auto* aligned = reinterpret_cast<std::byte*>(
      (reinterpret_cast<std::uintptr_t>(storage.get()) + 63) & ~std::uintptr_t{63});
  warps.resize(n);
  for (u32 k = 0; k < n; ++k) {
    Warp& w = warps[k];
    w = Warp{};
    w.base[0] = aligned + k * p.register_bytes;
    w.base[1] = p.constants_base();
    w.code = p.code.data();
    w.live = w.active = lane_mask(l.block.count(), k);
    w.index = k;
    w.block = this;
    w.launch = &l;
    w.tally = &tally;
    for (const auto& q : p.presets) preset(*this, w, q);
  }
}

bool Block::run(u64 slice, std::string& where) {
  const u64 stop_at = slice == 0 ? ~0ull : instructions + slice;
  u32 last = 0;
  asleep = false;
  for (;;) {
    const u32 n = static_cast<u32>(warps.size());
    u32 ready = 0, alive = 0;
    for (const Warp& w : warps) {
      if (w.live == 0) continue;
      alive |= 1u << w.index;
      if (!w.waits) ready |= 1u << w.index;
    }
    if (alive == 0) return true;
    if (launch->stop.load(std::memory_order_relaxed)) return true;
    if (ready == 0) stuck(*this, where);
    if (instructions >= stop_at) return false;
    u64 budget = 100'000;
    u32 pick = 0;
    if (launch->seed == 0) {
      // One warp after the other, each as far as it goes.
      const u32 ahead = ready & ~((1u << last) - 1);
      pick = static_cast<u32>(std::countr_zero(ahead != 0 ? ahead : ready));
    } else {
      const u64 r = random();
      u32 skip = static_cast<u32>(r % static_cast<u64>(std::popcount(ready)));
      u32 bits = ready;
      while (skip-- > 0) bits &= bits - 1;
      pick = static_cast<u32>(std::countr_zero(bits));
      budget = 1 + (r >> 32) % 200;
    }
    Warp& w = warps[pick];
    Step step = Step::Next;
    try {
      step = run_warp(w, budget);
    } catch (const Fault& fault) {
      where = describe_place(*this, w, fault);
      throw;
    }
    last = step == Step::Yield || step == Step::Sleep ? (pick + 1) % n : pick;
    if (step == Step::Block) w.waits = true;
    if (step == Step::Block || step == Step::Done) complete_barriers(*this);
    if (launch->max_instructions != 0 && instructions > launch->max_instructions) {
      const Fault fault{
          Finding::Timeout, -1,
          fmt::format("more than {} warp instructions in one block", launch->max_instructions)};
      where = describe_place(*this, w, fault);
      throw fault;
    }
    if (step == Step::Sleep && launch->cooperative && std::has_single_bit(ready)) {
      asleep = true;
      return false;
    }
  }
}

std::string describe_place(const Block& b, const Warp& w, const Fault& fault) {
  const Launch& l = *b.launch;
  const Program& p = *l.program;
  const auto& at = p.origins[w.pc];
  std::string who;
  if (fault.lane >= 0) {
    const u32 t = w.thread(fault.lane);
    who = fmt::format("thread ({},{},{})", t % l.block.x, t / l.block.x % l.block.y,
                      t / (l.block.x * l.block.y));
  } else {
    who = fmt::format("warp {}", w.index);
  }
  const std::string source = p.module->describe(at.source);
  return fmt::format(
      "{}: {}\n  kernel {}, block ({},{},{}) of ({},{},{}), {} of ({},{},{})\n"
      "  PTX line {}: {}{}{}",
      name_of(fault.finding), fault.text, p.readable, b.index.x, b.index.y, b.index.z, l.grid.x,
      l.grid.y, l.grid.z, who, l.block.x, l.block.y, l.block.z, at.line, at.text,
      source.empty() ? "" : "\n  source ", source);
}

}  // namespace cudasim
