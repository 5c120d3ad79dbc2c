#include "tests/cudasim/code/allocate.h"

#include <algorithm>
#include <set>

namespace cudasim {
namespace {

struct Effects {
  std::vector<int> uses, defs;
};

void collect(const ptx::Operand& o, bool destination, Effects& e) {
  // The base of an address is read, also where the instruction writes to memory.
  const bool writes = destination && o.kind != ptx::Operand::Kind::Address;
  if (o.reg >= 0) (writes ? e.defs : e.uses).push_back(o.reg);
  if (o.pair >= 0) (writes ? e.defs : e.uses).push_back(o.pair);
  for (const auto& item : o.items) collect(item, destination, e);
}

Effects effects_of(const FlatIns& f) {
  Effects e;
  const auto& i = f.ptx;
  if (i.guard.reg >= 0) e.uses.push_back(i.guard.reg);
  for (std::size_t k = 0; k < i.args.size(); ++k) collect(i.args[k], is_destination(i, k), e);
  // Lanes that the guard turns off keep the old value.
  if (i.guard.reg >= 0) e.uses.insert(e.uses.end(), e.defs.begin(), e.defs.end());
  return e;
}

class Liveness {
 public:
  Liveness(const Flat& flat, const std::vector<Effects>& effects) : flat_(flat) {
    words_ = (flat.register_bytes.size() + 63) / 64;
    find_blocks();
    for (auto& b : blocks_) summarise(b, effects);
    solve();
  }

  struct Block {
    u32 first, last;  // instructions, inclusive
    std::vector<u64> use, def, in, out;
  };
  const std::vector<Block>& blocks() const { return blocks_; }

  static bool has(const std::vector<u64>& set, int r) {
    return (set[static_cast<std::size_t>(r) / 64] >> (r % 64) & 1) != 0;
  }

 private:
  static void add(std::vector<u64>& set, int r) {
    set[static_cast<std::size_t>(r) / 64] |= 1ull << (r % 64);
  }

  bool ends_block(const FlatIns& f) const {
    return !f.targets.empty() || f.ptx.op[0] == "exit" || f.ptx.op[0] == "ret";
  }

  void find_blocks() {
    const u32 n = static_cast<u32>(flat_.code.size());
    std::set<u32> leaders{0};
    for (u32 k = 0; k < n; ++k) {
      for (const u32 t : flat_.code[k].targets) leaders.insert(t);
      if (ends_block(flat_.code[k]) && k + 1 < n) leaders.insert(k + 1);
    }
    block_of_.resize(n);
    for (auto it = leaders.begin(); it != leaders.end(); ++it) {
      const u32 end = std::next(it) == leaders.end() ? n : *std::next(it);
      for (u32 k = *it; k < end; ++k) block_of_[k] = static_cast<u32>(blocks_.size());
      const std::vector<u64> none(words_);
      blocks_.push_back({*it, end - 1, none, none, none, none});
    }
  }

  static void summarise(Block& b, const std::vector<Effects>& effects) {
    for (u32 k = b.first; k <= b.last; ++k) {
      for (const int r : effects[k].uses) {
        if (!has(b.def, r)) add(b.use, r);
      }
      for (const int r : effects[k].defs) add(b.def, r);
    }
  }

  void solve() {
    for (bool changed = true; changed;) {
      changed = false;
      for (auto b = blocks_.rbegin(); b != blocks_.rend(); ++b) {
        const FlatIns& last = flat_.code[b->last];
        std::vector<u64> out(words_);
        const auto join = [&](u32 at) {
          const auto& in = blocks_[block_of_[at]].in;
          for (std::size_t w = 0; w < words_; ++w) out[w] |= in[w];
        };
        for (const u32 t : last.targets) join(t);
        const bool always_jumps = !last.targets.empty() && last.ptx.guard.reg < 0;
        const bool always_ends = (last.ptx.op[0] == "exit" || last.ptx.op[0] == "ret") &&
                                 last.ptx.guard.reg < 0 && last.targets.empty();
        if (!always_jumps && !always_ends && b->last + 1 < flat_.code.size()) join(b->last + 1);
        for (std::size_t w = 0; w < words_; ++w) {
          const u64 in = b->use[w] | (out[w] & ~b->def[w]);
          changed = changed || in != b->in[w] || out[w] != b->out[w];
          b->in[w] = in;
          b->out[w] = out[w];
        }
      }
    }
  }

  const Flat& flat_;
  std::size_t words_ = 0;
  std::vector<Block> blocks_;
  std::vector<u32> block_of_;
};

struct Interval {
  int reg;
  u64 first, last;  // 2 k: instruction k reads, 2 k + 1: it writes
};

std::vector<Interval> intervals(const Flat& flat, const std::vector<Effects>& effects) {
  const Liveness liveness(flat, effects);
  const std::size_t n = flat.register_bytes.size();
  std::vector<Interval> all(n);
  for (std::size_t r = 0; r < n; ++r) all[r] = {static_cast<int>(r), ~0ull, 0};
  const auto extend = [&](int r, u64 at) {
    Interval& v = all[static_cast<std::size_t>(r)];
    v.first = std::min(v.first, at);
    v.last = std::max(v.last, at);
  };
  for (const auto& b : liveness.blocks()) {
    for (std::size_t r = 0; r < n; ++r) {
      if (Liveness::has(b.in, static_cast<int>(r))) extend(static_cast<int>(r), 2ull * b.first);
      if (Liveness::has(b.out, static_cast<int>(r))) extend(static_cast<int>(r), 2ull * b.last + 1);
    }
    for (u64 k = b.first; k <= b.last; ++k) {
      for (const int r : effects[k].uses) extend(r, 2 * k);
      for (const int r : effects[k].defs) extend(r, 2 * k + 1);
    }
  }
  std::erase_if(all, [](const Interval& v) { return v.first == ~0ull; });
  std::sort(all.begin(), all.end(),
            [](const Interval& a, const Interval& b) { return a.first < b.first; });
  return all;
}

u64 lane_bytes(u8 register_bytes) {
  return register_bytes == 0 ? 4 : register_bytes == 8 ? 8 * kLanes : 4 * kLanes;
}

}  // namespace

bool is_destination(const ptx::Instruction& i, std::size_t k) {
  static const std::set<std::string> none = {"st",
                                             "red",
                                             "bra",
                                             "brx",
                                             "ret",
                                             "exit",
                                             "membar",
                                             "fence",
                                             "cp",
                                             "call",
                                             "nanosleep",
                                             "trap",
                                             "prefetch",
                                             "prefetchu",
                                             "stmatrix",
                                             "barrier",
                                             "discard",
                                             "applypriority",
                                             "griddepcontrol",
                                             "nop",
                                             "pmevent"};
  if (k != 0) return false;
  if (i.op[0] == "bar" || i.op[0] == "barrier") return i.has("red");
  return !none.contains(i.op[0]);
}

RegisterFile allocate(const Flat& flat) {
  std::vector<Effects> effects;
  for (const auto& f : flat.code) effects.push_back(effects_of(f));
  RegisterFile file;
  file.place.assign(flat.register_bytes.size(), kNowhere);
  struct Slot {
    u64 bytes;
    Place place;
  };
  std::vector<std::pair<u64, Slot>> busy;  // (last, slot)
  std::vector<Slot> free;
  u32 live = 0;
  const auto units = [](u64 bytes) { return bytes == 4 ? 0u : static_cast<u32>(bytes / 128); };
  u64 top = 0;
  for (const Interval& v : intervals(flat, effects)) {
    const u64 bytes = lane_bytes(flat.register_bytes[static_cast<std::size_t>(v.reg)]);
    std::erase_if(busy, [&](const auto& b) {
      if (b.first >= v.first) return false;
      free.push_back(b.second);
      live -= units(b.second.bytes);
      return true;
    });
    const auto fits =
        std::find_if(free.begin(), free.end(), [&](const Slot& s) { return s.bytes == bytes; });
    Slot slot{bytes, static_cast<Place>(top)};
    if (fits != free.end()) {
      slot = *fits;
      free.erase(fits);
    } else {
      // Predicates take 4 bytes each; a whole line at a time keeps the lanes aligned.
      if (bytes == 4) {
        for (u32 k = 1; k < 16; ++k) free.push_back({4, static_cast<Place>(top + 4 * k)});
        top += 64;
      } else {
        top += bytes;
      }
    }
    file.place[static_cast<std::size_t>(v.reg)] = slot.place;
    busy.push_back({v.last, slot});
    live += units(bytes);
    file.most_live = std::max(file.most_live, live);
  }
  file.bytes = (top + 63) / 64 * 64;
  return file;
}

}  // namespace cudasim
