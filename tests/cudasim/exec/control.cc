#include <algorithm>

#include "tests/cudasim/exec/collective.h"

namespace cudasim {

void put_aside(Warp& w, u32 pc, u32 mask, bool waiting) {
  for (Fragment& f : w.others) {
    if (f.pc == pc) {  // lanes that meet go on together
      f.mask |= mask;
      f.waiting = f.waiting && waiting;
      return;
    }
  }
  w.others.push_back({pc, mask, waiting, 0});
}

namespace {

// Where the running fragment meets the next other one on a straight way.
void note_merge(Warp& w) {
  w.merge_pc = 0xffffffffu;
  for (const Fragment& f : w.others) {
    if (f.pc > w.pc) w.merge_pc = std::min(w.merge_pc, f.pc);
  }
}

// Reconvergence by least pc: code that comes later waits for lanes in code that comes before.
Step go_on(Warp& w, u32 taken, u32 target) {
  const u32 rest = w.active & ~taken;
  const u32 next = w.pc + 1;
  if (rest == 0 && w.others.empty()) {
    w.pc = target;
    return Step::Jump;
  }
  if (taken == 0 && w.others.empty()) {
    w.pc = next;
    return Step::Jump;
  }
  if (taken != 0 && rest != 0) ++w.tally->divergent_branches;
  if (taken != 0) put_aside(w, target, taken, false);
  if (rest != 0) put_aside(w, next, rest, false);
  // A loop backwards that spins on what lanes further on will do must let them run some time.
  if (taken != 0 && target <= w.pc && ++w.spins % 4096 == 0 && w.others.size() > 1) {
    const auto last = std::max_element(
        w.others.begin(), w.others.end(), [](const Fragment& a, const Fragment& b) {
          return !a.waiting && b.waiting ? false : a.waiting && !b.waiting ? true : a.pc < b.pc;
        });
    if (!last->waiting) {
      w.pc = last->pc;
      w.active = last->mask;
      w.lost = last->lost;
      w.others.erase(last);
      note_merge(w);
      return Step::Jump;
    }
  }
  switch_fragment(w);
  return Step::Jump;
}

Step branch(Warp& w, const Ins& i, u32 mask) { return go_on(w, mask, static_cast<u32>(i.imm)); }

Step branch_index(Warp& w, const Ins& i, u32 mask) {
  const u32* index = w.lanes<u32>(i.op[0]);
  u32 rest = mask;
  const u32 skipped = w.active & ~mask;
  if (skipped != 0) put_aside(w, w.pc + 1, skipped, false);
  while (rest != 0) {
    const int lane = std::countr_zero(rest);
    if (index[lane] >= i.targets->size()) {
      throw Fault{Finding::Trap, lane,
                  fmt::format("branch index {} of {}", index[lane], i.targets->size())};
    }
    u32 group = 0;
    for_lanes(rest, [&](int l) { group |= index[l] == index[lane] ? 1u << l : 0; });
    put_aside(w, (*i.targets)[index[lane]], group, false);
    rest &= ~group;
  }
  switch_fragment(w);
  return Step::Jump;
}

Step exit(Warp& w, const Ins&, u32 mask) {
  w.live &= ~mask;
  const u32 rest = w.active & ~mask;
  // Lanes that wait look again whether it was for those which have gone.
  for (Fragment& f : w.others) {
    if (f.waiting) f.lost |= mask;
    f.waiting = false;
  }
  if (rest != 0) put_aside(w, w.pc + 1, rest, false);
  if (w.live == 0) return Step::Done;
  switch_fragment(w);
  return Step::Jump;
}

Step trap(Warp&, const Ins&, u32 mask) {
  if (mask == 0) return Step::Next;
  throw Fault{Finding::Trap, std::countr_zero(mask), "trap"};
}

Step sleep(Warp&, const Ins&, u32) { return Step::Sleep; }
Step nothing(Warp&, const Ins&, u32) { return Step::Next; }

}  // namespace

bool switch_fragment(Warp& w) {
  auto best = w.others.end();
  for (auto f = w.others.begin(); f != w.others.end(); ++f) {
    if (!f->waiting && (best == w.others.end() || f->pc < best->pc)) best = f;
  }
  if (best == w.others.end()) return false;
  w.pc = best->pc;
  w.active = best->mask;
  w.lost = best->lost;
  w.others.erase(best);
  note_merge(w);
  return true;
}

Handler branch_handler() { return &branch; }
Handler branch_index_handler() { return &branch_index; }
Handler exit_handler() { return &exit; }
Handler trap_handler() { return &trap; }
Handler sleep_handler() { return &sleep; }
Handler nothing_handler() { return &nothing; }

}  // namespace cudasim
