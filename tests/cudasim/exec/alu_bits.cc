#include "tests/cudasim/exec/lanewise.h"
#include "tests/cudasim/exec/operators.h"

namespace cudasim {
namespace {

struct Not {
  template <class T>
  static T run(T a) {
    return static_cast<T>(~a);
  }
};
struct LogicalNot {
  template <class T>
  static T run(T a) {
    return a == 0 ? T{1} : T{0};
  }
};
// Shift amounts above the width clamp to it.
struct ShiftLeft {
  template <class T>
  static T run(T a, u32 n) {
    constexpr u32 bits = 8 * sizeof(T);
    return n >= bits ? T{0} : static_cast<T>(static_cast<Stored<T>>(a) << (n & (bits - 1)));
  }
};
struct ShiftRight {
  template <class T>
  static T run(T a, u32 n) {
    constexpr u32 bits = 8 * sizeof(T);
    if constexpr (std::is_signed_v<T>) return static_cast<T>(a >> (n >= bits ? bits - 1 : n));
    return n >= bits ? T{0} : static_cast<T>(a >> (n & (bits - 1)));
  }
};
template <bool Left, bool Wrap>
struct Funnel {
  static u32 run(u32 low, u32 high, u32 n) {
    n = Wrap ? n & 31 : (n > 32 ? 32 : n);
    const u64 both = static_cast<u64>(high) << 32 | low;
    return Left ? static_cast<u32>((both << n) >> 32) : static_cast<u32>(both >> n);
  }
};
struct Lop3 {
  static u32 run(u32 a, u32 b, u32 c, u32 table) {
    u32 r = 0;
    for (u32 k = 0; k < 8; ++k) {
      const u32 match = (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
      r |= (table >> k & 1) != 0 ? match : 0;
    }
    return r;
  }
};
struct PopulationCount {
  template <class T>
  static u32 run(T a) {
    return static_cast<u32>(std::popcount(a));
  }
};
struct LeadingZeros {
  template <class T>
  static u32 run(T a) {
    return static_cast<u32>(std::countl_zero(a));
  }
};
struct Reverse {
  template <class T>
  static T run(T a) {
    T r = 0;
    for (unsigned k = 0; k < 8 * sizeof(T); ++k) r |= (a >> k & 1) << (8 * sizeof(T) - 1 - k);
    return r;
  }
};
// Position of the highest bit that differs from the sign; 0xffffffff if there is none.
template <bool ShiftAmount>
struct FindBit {
  template <class T>
  static u32 run(T a) {
    using U = std::make_unsigned_t<T>;
    U u = static_cast<U>(a);
    if (std::is_signed_v<T> && a < 0) u = static_cast<U>(~u);
    if (u == 0) return 0xffffffffu;
    const auto zeros = static_cast<u32>(std::countl_zero(u));
    return ShiftAmount ? zeros : 8 * sizeof(T) - 1 - zeros;
  }
};
struct ExtractField {
  template <class T>
  static T run(T a, u32 position, u32 length) {
    using U = std::make_unsigned_t<T>;
    constexpr u32 bits = 8 * sizeof(T);
    const u32 p = position & 0xff, n = length & 0xff;
    bool sign = false;
    if (std::is_signed_v<T> && n != 0) {
      const u32 at = std::min(p + n - 1, bits - 1);
      sign = (static_cast<U>(a) >> at & 1) != 0;
    }
    U r = p >= bits ? U{0} : static_cast<U>(static_cast<U>(a) >> p);
    if (n < bits) {
      const U low = static_cast<U>((U{1} << n) - 1);
      // Bits past the top of `a` repeat the sign as well.
      const u32 there = p >= bits ? 0 : std::min(n, bits - p);
      const U known = there >= bits ? ~U{0} : static_cast<U>((U{1} << there) - 1);
      r &= low & known;
      if (sign) r |= static_cast<U>(~known);
    } else if (sign) {
      const u32 there = p >= bits ? 0 : bits - p;
      const U known = there >= bits ? ~U{0} : static_cast<U>((U{1} << there) - 1);
      r = static_cast<U>((r & known) | static_cast<U>(~known));
    }
    return static_cast<T>(r);
  }
};
struct InsertField {
  template <class T>
  static T run(T a, T b, u32 position, u32 length) {
    constexpr u32 bits = 8 * sizeof(T);
    const u32 p = position & 0xff, n = length & 0xff;
    if (p >= bits || n == 0) return b;
    const T ones = n >= bits ? ~T{0} : (T{1} << n) - 1;
    return (b & ~(ones << p)) | ((a & ones) << p);
  }
};

u32 byte_of(u64 pool, u32 selector) {
  const u32 byte = static_cast<u32>(pool >> 8 * (selector & 7)) & 0xff;
  return (selector & 8) == 0 ? byte : (byte & 0x80) != 0 ? 0xffu : 0u;
}
struct Permute {
  static u32 run(u32 a, u32 b, u32 selector) {
    const u64 pool = static_cast<u64>(b) << 32 | a;
    u32 r = 0;
    for (u32 k = 0; k < 4; ++k) r |= byte_of(pool, selector >> 4 * k & 15) << 8 * k;
    return r;
  }
};
// prmt's other modes, by the table of the manual: byte k of the result for selector s.
enum class PermuteMode { Forward4, Backward4, Replicate8, EdgeLeft, EdgeRight, Replicate16 };
template <PermuteMode M>
struct PermuteAs {
  static u32 run(u32 a, u32 b, u32 selector) {
    const u64 pool = static_cast<u64>(b) << 32 | a;
    const u32 s = selector & 3;
    u32 r = 0;
    for (u32 k = 0; k < 4; ++k) {
      u32 at = 0;
      switch (M) {
        case PermuteMode::Forward4:
          at = s + k;
          break;
        case PermuteMode::Backward4:
          at = (s + 8 - k) & 7;
          break;
        case PermuteMode::Replicate8:
          at = s;
          break;
        case PermuteMode::EdgeLeft:
          at = std::max(s, k);
          break;
        case PermuteMode::EdgeRight:
          at = std::min(s, k);
          break;
        case PermuteMode::Replicate16:
          at = (s & 1) * 2 + (k & 1);
          break;
      }
      r |= byte_of(pool, at) << 8 * k;
    }
    return r;
  }
};

Choice permute(const ptx::Instruction& i) {
  if (i.op.back() == "b32" && i.op.size() == 2) return lanewise<Permute, u32, u32, u32, u32>();
  if (i.op.size() != 3 || i.op[1] != "b32") return {};
  const std::string& mode = i.op[2];
  if (mode == "f4e") return lanewise<PermuteAs<PermuteMode::Forward4>, u32, u32, u32, u32>();
  if (mode == "b4e") return lanewise<PermuteAs<PermuteMode::Backward4>, u32, u32, u32, u32>();
  if (mode == "rc8") return lanewise<PermuteAs<PermuteMode::Replicate8>, u32, u32, u32, u32>();
  if (mode == "ecl") return lanewise<PermuteAs<PermuteMode::EdgeLeft>, u32, u32, u32, u32>();
  if (mode == "ecr") return lanewise<PermuteAs<PermuteMode::EdgeRight>, u32, u32, u32, u32>();
  if (mode == "rc16") return lanewise<PermuteAs<PermuteMode::Replicate16>, u32, u32, u32, u32>();
  return {};
}

// Predicates are masks of lanes.
template <class Op>
Step on_predicates(Warp& w, const Ins& i, u32 mask) {
  w.set_predicate(i.op[0], Op::template run<u32>(w.predicate(i.op[1]), w.predicate(i.op[2])), mask);
  return Step::Next;
}
Step not_predicate(Warp& w, const Ins& i, u32 mask) {
  w.set_predicate(i.op[0], ~w.predicate(i.op[1]), mask);
  return Step::Next;
}

template <class Op>
Choice logic(std::string_view type) {
  if (type == "pred") return {&on_predicates<Op>, {1, 1, 1}};
  return with_type(Words{}, type, []<class T>() { return lanewise<Op, T, T, T>(); });
}

}  // namespace

Choice bits_handler(const ptx::Instruction& i) {
  const std::string& op = i.op[0];
  const std::string& type = i.op.back();
  using Both = Types<u32, u64>;
  if (op == "prmt") return permute(i);
  if (op == "shf" && i.op.size() == 4 && type == "b32") {
    const bool left = i.op[1] == "l", wrap = i.op[2] == "wrap";
    if ((!left && i.op[1] != "r") || (!wrap && i.op[2] != "clamp")) return {};
    if (left) {
      return wrap ? lanewise<Funnel<true, true>, u32, u32, u32, u32>()
                  : lanewise<Funnel<true, false>, u32, u32, u32, u32>();
    }
    return wrap ? lanewise<Funnel<false, true>, u32, u32, u32, u32>()
                : lanewise<Funnel<false, false>, u32, u32, u32, u32>();
  }
  if (op == "bfind" && only(i, {"shiftamt"})) {
    return with_type(Types<u32, i32, u64, i64>{}, type, [&]<class T>() {
      return i.op.size() == 3 ? lanewise<FindBit<true>, u32, T>()
                              : lanewise<FindBit<false>, u32, T>();
    });
  }
  if (i.op.size() != 2) return {};
  if (op == "and") return logic<And>(type);
  if (op == "or") return logic<Or>(type);
  if (op == "xor") return logic<Xor>(type);
  if (op == "not" && type == "pred") return {&not_predicate, {1, 1}};
  if (op == "not") {
    return with_type(Words{}, type, []<class T>() { return lanewise<Not, T, T>(); });
  }
  if (op == "cnot") {
    return with_type(Words{}, type, []<class T>() { return lanewise<LogicalNot, T, T>(); });
  }
  if (op == "shl") {
    return with_type(Words{}, type, []<class T>() { return lanewise<ShiftLeft, T, T, u32>(); });
  }
  if (op == "shr") {
    return with_type(Integers{}, type, []<class T>() { return lanewise<ShiftRight, T, T, u32>(); });
  }
  if (op == "lop3" && type == "b32") return lanewise<Lop3, u32, u32, u32, u32, u32>();
  if (op == "popc") {
    return with_type(Both{}, type, []<class T>() { return lanewise<PopulationCount, u32, T>(); });
  }
  if (op == "clz") {
    return with_type(Both{}, type, []<class T>() { return lanewise<LeadingZeros, u32, T>(); });
  }
  if (op == "brev") {
    return with_type(Both{}, type, []<class T>() { return lanewise<Reverse, T, T>(); });
  }
  if (op == "bfe") {
    return with_type(Types<u32, i32, u64, i64>{}, type,
                     []<class T>() { return lanewise<ExtractField, T, T, u32, u32>(); });
  }
  if (op == "bfi") {
    return with_type(Both{}, type,
                     []<class T>() { return lanewise<InsertField, T, T, T, u32, u32>(); });
  }
  return {};
}

}  // namespace cudasim
