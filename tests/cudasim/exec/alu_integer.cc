#include "tests/cudasim/exec/lanewise.h"
#include "tests/cudasim/exec/operators.h"

namespace cudasim {
namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
struct WiderOf {
  using type = std::conditional_t<std::is_signed_v<T>, i128, u128>;
};
template <>
struct WiderOf<u16> {
  using type = u32;
};
template <>
struct WiderOf<i16> {
  using type = i32;
};
template <>
struct WiderOf<u32> {
  using type = u64;
};
template <>
struct WiderOf<i32> {
  using type = i64;
};
template <class T>
using Wider = typename WiderOf<T>::type;

// Wrap-around arithmetic in the unsigned type of at least 32 bits: u16 · u16 would overflow int.
template <class T>
using Safe = std::conditional_t<sizeof(T) == 8, u64, u32>;

struct Add {
  template <class T>
  static T run(T a, T b) {
    return static_cast<T>(static_cast<Safe<T>>(a) + static_cast<Safe<T>>(b));
  }
};
struct Subtract {
  template <class T>
  static T run(T a, T b) {
    return static_cast<T>(static_cast<Safe<T>>(a) - static_cast<Safe<T>>(b));
  }
};
struct MultiplyLow {
  template <class T>
  static T run(T a, T b) {
    return static_cast<T>(static_cast<Safe<T>>(a) * static_cast<Safe<T>>(b));
  }
};
struct MultiplyHigh {
  template <class T>
  static T run(T a, T b) {
    return static_cast<T>((static_cast<Wider<T>>(a) * b) >> (8 * sizeof(T)));
  }
};
struct MultiplyWide {
  template <class T>
  static Wider<T> run(T a, T b) {
    return static_cast<Wider<T>>(a) * b;
  }
};
struct MadLow {
  template <class T>
  static T run(T a, T b, T c) {
    return Add::run(MultiplyLow::run(a, b), c);
  }
};
struct MadHigh {
  template <class T>
  static T run(T a, T b, T c) {
    return Add::run(MultiplyHigh::run(a, b), c);
  }
};
struct MadWide {
  template <class T>
  static Wider<T> run(T a, T b, Wider<T> c) {
    return Add::run(MultiplyWide::run(a, b), c);
  }
};
struct AddSaturated {
  static i32 run(i32 a, i32 b) {
    return static_cast<i32>(std::clamp<i64>(static_cast<i64>(a) + b, INT32_MIN, INT32_MAX));
  }
};
struct SubtractSaturated {
  static i32 run(i32 a, i32 b) {
    return static_cast<i32>(std::clamp<i64>(static_cast<i64>(a) - b, INT32_MIN, INT32_MAX));
  }
};
// The manual leaves division by zero unspecified; lanes that are off must not trap either.
struct Divide {
  template <class T>
  static T run(T a, T b) {
    if (b == 0) return static_cast<T>(-1);
    if constexpr (std::is_signed_v<T>) {
      if (b == -1) return Subtract::run(T{0}, a);
    }
    return static_cast<T>(a / b);
  }
};
struct Remainder {
  template <class T>
  static T run(T a, T b) {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<T>) {
      if (b == -1) return 0;
    }
    return static_cast<T>(a % b);
  }
};
struct Absolute {
  template <class T>
  static T run(T a) {
    return a < 0 ? Subtract::run(T{0}, a) : a;
  }
};
struct Negate {
  template <class T>
  static T run(T a) {
    return Subtract::run(T{0}, a);
  }
};
struct AbsoluteDifference {
  template <class T>
  static T run(T a, T b, T c) {
    return Add::run(a < b ? Subtract::run(b, a) : Subtract::run(a, b), c);
  }
};
struct Multiply24 {
  static i32 run(i32 a, i32 b) {
    return MultiplyLow::run(static_cast<i32>(static_cast<u32>(a) << 8) >> 8,
                            static_cast<i32>(static_cast<u32>(b) << 8) >> 8);
  }
  static u32 run(u32 a, u32 b) { return (a & 0xffffff) * (b & 0xffffff); }
};

template <class A, class B>
struct DotBytes {
  static i32 run(u32 a, u32 b, i32 c) {
    u32 sum = static_cast<u32>(c);
    for (int k = 0; k < 32; k += 8) {
      const i32 x = static_cast<A>(a >> k), y = static_cast<B>(b >> k);
      sum += static_cast<u32>(x * y);
    }
    return static_cast<i32>(sum);
  }
};

template <class A, class B, bool High>
struct DotShorts {
  static i32 run(u32 a, u32 b, i32 c) {
    u32 sum = static_cast<u32>(c);
    for (int k = 0; k < 2; ++k) {
      const i32 x = std::is_signed_v<A> ? static_cast<i16>(a >> 16 * k)
                                        : static_cast<i32>(static_cast<u16>(a >> 16 * k));
      const i32 y = static_cast<B>(b >> (8 * k + (High ? 16 : 0)));
      sum += static_cast<u32>(x * y);
    }
    return static_cast<i32>(sum);
  }
};

template <template <class, class> class Op>
Choice dot(bool a, bool b) {  // signed?
  if (a && b) return lanewise<Op<i8, i8>, i32, u32, u32, i32>();
  if (a) return lanewise<Op<i8, u8>, i32, u32, u32, i32>();
  if (b) return lanewise<Op<u8, i8>, i32, u32, u32, i32>();
  return lanewise<Op<u8, u8>, i32, u32, u32, i32>();
}
template <class A, class B>
using DotShortsLow = DotShorts<A, B, false>;
template <class A, class B>
using DotShortsHigh = DotShorts<A, B, true>;

// Extended precision: add.cc, addc(.cc), sub.cc, subc, mad.lo/hi.cc, madc. The carry flag is kept
// by lane.
template <class T, bool Subtracts, bool CarryIn, bool CarryOut>
Step add_with_carry(Warp& w, const Ins& i, u32 mask) {
  using S = Stored<T>;
  S* d = w.lanes<S>(i.op[0]);
  const S* a = w.lanes<S>(i.op[1]);
  const S* b = w.lanes<S>(i.op[2]);
  u32 carry = w.carry;
  for_lanes(mask, [&](int l) {
    const unsigned in = CarryIn ? w.carry >> l & 1 : 0;
    const u128 wide =
        Subtracts ? static_cast<u128>(a[l]) - b[l] - in : static_cast<u128>(a[l]) + b[l] + in;
    d[l] = static_cast<S>(wide);
    const u32 out = static_cast<u32>(wide >> (8 * sizeof(S))) & 1;
    carry = (carry & ~(1u << l)) | out << l;
  });
  if (CarryOut) w.carry = carry;
  return Step::Next;
}

template <class T, bool High, bool CarryIn, bool CarryOut>
Step mad_with_carry(Warp& w, const Ins& i, u32 mask) {
  using S = Stored<T>;
  S* d = w.lanes<S>(i.op[0]);
  const S* a = w.lanes<S>(i.op[1]);
  const S* b = w.lanes<S>(i.op[2]);
  const S* c = w.lanes<S>(i.op[3]);
  u32 carry = w.carry;
  for_lanes(mask, [&](int l) {
    const T x = std::bit_cast<T>(a[l]), y = std::bit_cast<T>(b[l]);
    const S product = static_cast<S>(High ? MultiplyHigh::run(x, y) : MultiplyLow::run(x, y));
    const u128 wide = static_cast<u128>(product) + c[l] + (CarryIn ? w.carry >> l & 1 : 0);
    d[l] = static_cast<S>(wide);
    carry = (carry & ~(1u << l)) | (static_cast<u32>(wide >> (8 * sizeof(S))) & 1) << l;
  });
  if (CarryOut) w.carry = carry;
  return Step::Next;
}

Choice extended(const ptx::Instruction& i) {
  const std::string& op = i.op[0];
  const bool out = i.has("cc");
  return with_type(Types<u32, i32, u64, i64>{}, i.op.back(), [&]<class T>() -> Choice {
    constexpr u8 w = kStoredWidth<T>;
    if (op == "add" && out) return {&add_with_carry<T, false, false, true>, {w, w, w}};
    if (op == "sub" && out) return {&add_with_carry<T, true, false, true>, {w, w, w}};
    if (op == "addc") {
      return {out ? &add_with_carry<T, false, true, true> : &add_with_carry<T, false, true, false>,
              {w, w, w}};
    }
    if (op == "subc") {
      return {out ? &add_with_carry<T, true, true, true> : &add_with_carry<T, true, true, false>,
              {w, w, w}};
    }
    const bool high = i.has("hi");
    if (op == "mad" && out) {
      return {high ? &mad_with_carry<T, true, false, true> : &mad_with_carry<T, false, false, true>,
              {w, w, w, w}};
    }
    if (op == "madc" && out) {
      return {high ? &mad_with_carry<T, true, true, true> : &mad_with_carry<T, false, true, true>,
              {w, w, w, w}};
    }
    if (op == "madc") {
      return {high ? &mad_with_carry<T, true, true, false> : &mad_with_carry<T, false, true, false>,
              {w, w, w, w}};
    }
    return {};
  });
}

template <class Op>
Choice same(std::string_view type) {
  return with_type(Integers{}, type, []<class T>() { return lanewise<Op, T, T, T>(); });
}

Choice multiply(const ptx::Instruction& i, bool adds) {
  const std::string& type = i.op.back();
  if (i.has("wide")) {
    return with_type(Types<u16, i16, u32, i32>{}, type, [&]<class T>() -> Choice {
      using W = Wider<T>;
      return adds ? lanewise<MadWide, W, T, T, W>() : lanewise<MultiplyWide, W, T, T>();
    });
  }
  const bool high = i.has("hi");
  if (!high && !i.has("lo")) return {};
  return with_type(Integers{}, type, [&]<class T>() -> Choice {
    if (adds) return high ? lanewise<MadHigh, T, T, T, T>() : lanewise<MadLow, T, T, T, T>();
    return high ? lanewise<MultiplyHigh, T, T, T>() : lanewise<MultiplyLow, T, T, T>();
  });
}

}  // namespace

Choice integer_handler(const ptx::Instruction& i) {
  const std::string& op = i.op[0];
  const std::string& type = i.op.back();
  if (op == "dp4a" && i.op.size() == 3) return dot<DotBytes>(i.op[1] == "s32", type == "s32");
  if (op == "dp2a" && i.op.size() == 4) {
    const bool a = i.op[2] == "s32", b = type == "s32";
    return i.has("hi") ? dot<DotShortsHigh>(a, b) : dot<DotShortsLow>(a, b);
  }
  if (i.has("cc") || op == "addc" || op == "subc" || op == "madc") {
    return only(i, {"cc", "lo", "hi"}) ? extended(i) : Choice{};
  }
  if (i.has("sat")) {
    if (type != "s32" || i.op.size() != 3) return {};
    if (op == "add") return lanewise<AddSaturated, i32, i32, i32>();
    if (op == "sub") return lanewise<SubtractSaturated, i32, i32, i32>();
    return {};
  }
  if (op == "mul" && only(i, {"lo", "hi", "wide"})) return multiply(i, false);
  if (op == "mad" && only(i, {"lo", "hi", "wide"})) return multiply(i, true);
  if (op == "mul24" && i.has("lo") && i.op.size() == 3) {
    return with_type(Types<u32, i32>{}, type,
                     []<class T>() { return lanewise<Multiply24, T, T, T>(); });
  }
  if (i.op.size() != 2) return {};
  if (op == "add") return same<Add>(type);
  if (op == "sub") return same<Subtract>(type);
  if (op == "div") return same<Divide>(type);
  if (op == "rem") return same<Remainder>(type);
  if (op == "min") return same<Least>(type);
  if (op == "max") return same<Greatest>(type);
  if (op == "sad") {
    return with_type(Integers{}, type,
                     []<class T>() { return lanewise<AbsoluteDifference, T, T, T, T>(); });
  }
  if (op == "abs" || op == "neg") {
    return with_type(Types<i16, i32, i64>{}, type, [&]<class T>() {
      return op == "abs" ? lanewise<Absolute, T, T>() : lanewise<Negate, T, T>();
    });
  }
  return {};
}

}  // namespace cudasim
