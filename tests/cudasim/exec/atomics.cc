#include <algorithm>

#include "tests/cudasim/exec/memory_ops.h"
#include "tests/cudasim/exec/number.h"
#include "tests/cudasim/exec/race.h"

namespace cudasim {
namespace {

// New value from what is in memory, the operand and, for cas, the second operand. Bits throughout.
struct AtomicAdd {
  template <class T>
  static T run(T old, T b, T) {
    return old + b;
  }
  static Half run(Half old, Half b, Half) { return to_half(to_float(old) + to_float(b)); }
  static Bf16 run(Bf16 old, Bf16 b, Bf16) { return to_bf16(to_float(old) + to_float(b)); }
  template <class T>
  static Pair<T> run(Pair<T> old, Pair<T> b, Pair<T>) {
    return {run(old.low, b.low, b.low), run(old.high, b.high, b.high)};
  }
};
struct AtomicLeast {
  template <class T>
  static T run(T old, T b, T) {
    return std::min(old, b);
  }
};
struct AtomicGreatest {
  template <class T>
  static T run(T old, T b, T) {
    return std::max(old, b);
  }
};
struct AtomicAnd {
  template <class T>
  static T run(T old, T b, T) {
    return old & b;
  }
};
struct AtomicOr {
  template <class T>
  static T run(T old, T b, T) {
    return old | b;
  }
};
struct AtomicXor {
  template <class T>
  static T run(T old, T b, T) {
    return old ^ b;
  }
};
struct AtomicExchange {
  template <class T>
  static T run(T, T b, T) {
    return b;
  }
};
struct AtomicCompare {  // d = old == b ? c : old
  template <class T>
  static T run(T old, T b, T c) {
    return old == b ? c : old;
  }
};
struct AtomicIncrement {
  static u32 run(u32 old, u32 b, u32) { return old >= b ? 0 : old + 1; }
};
struct AtomicDecrement {
  static u32 run(u32 old, u32 b, u32) { return old == 0 || old > b ? b : old - 1; }
};

template <std::size_t N>
struct BitsOf;
template <>
struct BitsOf<2> {
  using type = u16;
};
template <>
struct BitsOf<4> {
  using type = u32;
};
template <>
struct BitsOf<8> {
  using type = u64;
};

template <Space S, class Op, class T>
Step atomic(Warp& w, const Ins& i, u32 mask) {
  using Bits = typename BitsOf<sizeof(T)>::type;
  using Lane = std::conditional_t<sizeof(T) == 8, u64, u32>;
  alignas(64) u64 a[kLanes];
  addresses(w, i, a);
  const Lane* b = w.lanes<Lane>(i.op[2]);
  const Lane* c = i.op[3] == kNowhere ? b : w.lanes<Lane>(i.op[3]);
  Lane* d = i.op[0] == kNowhere ? nullptr : w.lanes<Lane>(i.op[0]);
  if ((i.flags & kReleases) != 0) fence(w);
  release(w);
  u64 shared_mask = 0, global_mask = 0;
  for_lanes(mask, [&](int l) {
    bool in_shared = S == Space::Shared;
    u64 address = a[l];
    if (S == Space::Generic && address - kSharedWindow < kWindowBytes) {
      in_shared = true;
      address -= kSharedWindow;
    }
    void* at = nullptr;
    if (in_shared) {
      at = check_shared(w, l, address, sizeof(T), true, true, nullptr);
      shared_mask |= 1ull << l;
    } else {
      check_global(w, l, address, sizeof(T), true, true, nullptr, kPlain);
      at = reinterpret_cast<void*>(address);
      global_mask |= 1ull << l;
    }
    // Blocks run on several host threads: the update itself must be atomic.
    std::atomic_ref<Bits> memory(*static_cast<Bits*>(at));
    Bits old = memory.load(std::memory_order_relaxed), next;
    do {
      next = std::bit_cast<Bits>(Op::run(std::bit_cast<T>(old),
                                         std::bit_cast<T>(static_cast<Bits>(b[l])),
                                         std::bit_cast<T>(static_cast<Bits>(c[l]))));
    } while (!memory.compare_exchange_weak(old, next, std::memory_order_relaxed));
    // b and c of later lanes may be the same register as d: lanes never read each other's.
    if (d != nullptr) d[l] = old;
  });
  acquire(w);
  Tally& t = *w.tally;
  ++t.atomic_requests;
  t.atomic_lanes += static_cast<u64>(std::popcount(mask));
  std::array<u64, kLanes> sorted;
  std::size_t n = 0;
  for_lanes(mask, [&](int l) { sorted[n++] = a[l]; });
  const auto end = sorted.begin() + static_cast<std::ptrdiff_t>(n);
  std::sort(sorted.begin(), end);
  t.atomic_same_address += static_cast<u64>(end - std::unique(sorted.begin(), end));
  if (global_mask != 0) count_global(w, static_cast<u32>(global_mask), a, sizeof(T), true);
  return Step::Next;
}

template <Space S, class T>
Handler integers(std::string_view op) {
  if (op == "add") return &atomic<S, AtomicAdd, T>;
  if (op == "min") return &atomic<S, AtomicLeast, T>;
  if (op == "max") return &atomic<S, AtomicGreatest, T>;
  return nullptr;
}

template <Space S, class T>
Handler words(std::string_view op) {
  if (op == "and") return &atomic<S, AtomicAnd, T>;
  if (op == "or") return &atomic<S, AtomicOr, T>;
  if (op == "xor") return &atomic<S, AtomicXor, T>;
  if (op == "exch") return &atomic<S, AtomicExchange, T>;
  if (op == "cas") return &atomic<S, AtomicCompare, T>;
  return nullptr;
}

template <Space S>
Handler choose(std::string_view op, std::string_view type) {
  if (type == "u32" && op == "inc") return &atomic<S, AtomicIncrement, u32>;
  if (type == "u32" && op == "dec") return &atomic<S, AtomicDecrement, u32>;
  if (type == "u32") return integers<S, u32>(op);
  if (type == "s32") return integers<S, i32>(op);
  if (type == "u64") return integers<S, u64>(op);
  if (type == "s64") return integers<S, i64>(op);
  if (type == "b32") return words<S, u32>(op);
  if (type == "b64") return words<S, u64>(op);
  if (type == "b16" && op == "cas") return &atomic<S, AtomicCompare, u16>;
  if (op != "add") return nullptr;
  if (type == "f32") return &atomic<S, AtomicAdd, float>;
  if (type == "f64") return &atomic<S, AtomicAdd, double>;
  if (type == "f16") return &atomic<S, AtomicAdd, Half>;
  if (type == "bf16") return &atomic<S, AtomicAdd, Bf16>;
  if (type == "f16x2") return &atomic<S, AtomicAdd, Pair<Half>>;
  if (type == "bf16x2") return &atomic<S, AtomicAdd, Pair<Bf16>>;
  return nullptr;
}

}  // namespace

Handler atomic_handler(Space space, std::string_view op, std::string_view type) {
  switch (space) {
    case Space::Generic:
      return choose<Space::Generic>(op, type);
    case Space::Global:
      return choose<Space::Global>(op, type);
    case Space::Shared:
      return choose<Space::Shared>(op, type);
    default:
      return nullptr;
  }
}

}  // namespace cudasim
