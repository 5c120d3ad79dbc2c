#include <chrono>

#include "tests/cudasim/exec/lanewise.h"
#include "tests/cudasim/ptx/parser.h"

namespace cudasim {
namespace {

template <class S>
Step copy(Warp& w, const Ins& i, u32 mask) {
  const S* a = w.lanes<S>(i.op[1]);
  each(w.lanes<S>(i.op[0]), mask, [=](int l) { return a[l]; });
  return Step::Next;
}

Step copy_predicate(Warp& w, const Ins& i, u32 mask) {
  w.set_predicate(i.op[0], w.predicate(i.op[1]), mask);
  return Step::Next;
}

// Elements of i.width bytes; more[0 … count) are the parts, lowest first; op[0] is the whole.
template <class Whole, class Part>
Step pack(Warp& w, const Ins& i, u32 mask) {
  Whole* d = w.lanes<Whole>(i.op[0]);
  const u64 part_mask = (1ull << 8 * i.width) - 1;
  alignas(64) u64 sum[kLanes] = {};
  for (int k = 0; k < i.count; ++k) {
    const Part* a = w.lanes<Part>(i.more[k]);
    for (int l = 0; l < kLanes; ++l) sum[l] |= (a[l] & part_mask) << (8 * i.width * k);
  }
  each(d, mask, [&](int l) { return static_cast<Whole>(sum[l]); });
  return Step::Next;
}

template <class Whole, class Part>
Step unpack(Warp& w, const Ins& i, u32 mask) {
  const u64 part_mask = (1ull << 8 * i.width) - 1;
  alignas(64) Whole a[kLanes];  // a part may be the same register
  std::memcpy(a, w.lanes<Whole>(i.op[0]), sizeof a);
  for (int k = 0; k < i.count; ++k) {
    if (i.more[k] == kNowhere) continue;
    each(w.lanes<Part>(i.more[k]), mask, [&](int l) {
      return static_cast<Part>(static_cast<u64>(a[l]) >> (8 * i.width * k) & part_mask);
    });
  }
  return Step::Next;
}

template <u64 Window>
struct ToGeneric {
  static u64 run(u64 a) { return a + Window; }
};
template <u64 Window>
struct FromGeneric {
  static u64 run(u64 a) { return a - Window; }
};

template <u64 Window>
Step in_window(Warp& w, const Ins& i, u32 mask) {
  const u64* a = w.lanes<u64>(i.op[1]);
  u32 bits = 0;
  for (int l = 0; l < kLanes; ++l) {
    const bool shared = a[l] - kSharedWindow < kWindowBytes;
    const bool local = a[l] - kLocalWindow < kWindowBytes;
    const bool r = Window == 0 ? !shared && !local : Window == kSharedWindow ? shared : local;
    bits |= static_cast<u32>(r) << l;
  }
  w.set_predicate(i.op[0], bits, mask);
  return Step::Next;
}

// Ins::flags of read_clock
enum { kClock32, kClockHigh, kClock64, kGlobalTimer };

Step read_clock(Warp& w, const Ins& i, u32 mask) {
  u64 t = w.started;
  if (i.flags == kGlobalTimer) {
    t = static_cast<u64>(std::chrono::steady_clock::now().time_since_epoch().count());
  }
  if (i.flags == kClockHigh) t >>= 32;
  if (i.width == 8) {
    each(w.lanes<u64>(i.op[0]), mask, [=](int) { return t; });
  } else {
    each(w.lanes<u32>(i.op[0]), mask, [=](int) { return static_cast<u32>(t); });
  }
  return Step::Next;
}

}  // namespace

Choice move_handler(const ptx::Instruction& i) {
  const std::string& op = i.op[0];
  if (op == "mov" && i.op.size() == 2) {
    if (i.op[1] == "pred") return {&copy_predicate, {1, 1}};
    const u64 bytes = ptx::type_size(i.op[1]);
    if (bytes == 8) return {&copy<u64>, {8, 8}};
    if (bytes <= 4) return {&copy<u32>, {4, 4}};
    return {};
  }
  if (op == "cvta") {
    const bool to = i.op.size() == 4 && i.op[1] == "to";
    if (i.op.back() != "u64" || (!to && i.op.size() != 3)) return {};
    const std::string& space = i.op[to ? 2 : 1];
    if (space == "shared" || space == "shared::cta") {
      return to ? lanewise<FromGeneric<kSharedWindow>, u64, u64>()
                : lanewise<ToGeneric<kSharedWindow>, u64, u64>();
    }
    if (space == "local") {
      return to ? lanewise<FromGeneric<kLocalWindow>, u64, u64>()
                : lanewise<ToGeneric<kLocalWindow>, u64, u64>();
    }
    if (space == "global" || space == "const") return {&copy<u64>, {8, 8}};
    return {};
  }
  if (op == "isspacep" && i.op.size() == 2) {
    if (i.op[1] == "shared") return {&in_window<kSharedWindow>, {1, 8}};
    if (i.op[1] == "local") return {&in_window<kLocalWindow>, {1, 8}};
    if (i.op[1] == "global") return {&in_window<0>, {1, 8}};
  }
  return {};
}

Handler pack_handler(u64 whole, u64 part) {
  if (whole == 8) return part == 8 ? &pack<u64, u64> : &pack<u64, u32>;
  return &pack<u32, u32>;
}

Handler unpack_handler(u64 whole, u64 part) {
  if (whole == 8) return part == 8 ? &unpack<u64, u64> : &unpack<u64, u32>;
  return &unpack<u32, u32>;
}

Handler clock_handler(std::string_view name, u32& flags) {
  if (name == "clock")
    flags = kClock32;
  else if (name == "clock_hi")
    flags = kClockHigh;
  else if (name == "clock64")
    flags = kClock64;
  else if (name == "globaltimer")
    flags = kGlobalTimer;
  else
    return nullptr;
  return &read_clock;
}

}  // namespace cudasim
