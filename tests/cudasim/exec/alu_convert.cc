#include "tests/cudasim/exec/lanewise.h"

namespace cudasim {
namespace {

enum class Rounding { Nearest, Zero, Down, Up };

template <Rounding R>
double integral(double v) {
  switch (R) {
    case Rounding::Zero:
      return std::trunc(v);
    case Rounding::Down:
      return std::floor(v);
    case Rounding::Up:
      return std::ceil(v);
    default:
      return std::nearbyint(v);
  }
}

// v as a float in direction R; v is exact in long double.
template <Rounding R>
float to_single(long double v) {
  const float f = static_cast<float>(v);
  if (R == Rounding::Nearest || !(v - v == 0)) return f;
  const bool above = static_cast<long double>(f) > v, below = static_cast<long double>(f) < v;
  constexpr float inf = std::numeric_limits<float>::infinity();
  if (above && (R == Rounding::Down || (R == Rounding::Zero && v > 0))) {
    return std::nextafter(f, -inf);
  }
  if (below && (R == Rounding::Up || (R == Rounding::Zero && v < 0))) {
    return std::nextafter(f, inf);
  }
  return f;
}

// A float as a half of type T in direction R.
template <class T, Rounding R>
T to_half_type(float v) {
  const T r = half_from<T>(v);
  if (R == Rounding::Nearest || !(v - v == 0)) return r;
  const float back = to_float(r);
  // The neighbour towards zero is one less in magnitude.
  if (R == Rounding::Zero && std::fabs(back) > std::fabs(v)) {
    return {static_cast<u16>(r.bits - 1)};
  }
  if (R == Rounding::Down && back > v) {
    if (back > 0) return {static_cast<u16>(r.bits - 1)};
    return (r.bits & 0x7fff) == 0 ? T{0x8001} : T{static_cast<u16>(r.bits + 1)};
  }
  if (R == Rounding::Up && back < v) {
    if (back < 0) return {static_cast<u16>(r.bits - 1)};
    return (r.bits & 0x7fff) == 0 ? T{0x0001} : T{static_cast<u16>(r.bits + 1)};
  }
  return r;
}

// A source of type T in a 64-bit register: its low bits. The manual lets the registers of cvt be
// wider than its types, and truncates.
template <class T>
struct Chopped {
  u64 bits;
  operator T() const { return narrow<T>(static_cast<u32>(bits)); }
};

template <class T>
constexpr bool is_half = std::is_same_v<T, Half> || std::is_same_v<T, Bf16>;
template <class T>
constexpr bool is_floating = std::is_floating_point_v<T> || is_half<T>;

// `Out` is D sign- or zero-extended to the width of the destination register.
template <class D, class Out, Rounding R, bool Sat, bool Ftz, bool Integral>
struct Convert {
  template <class A>
  static Out run(Chopped<A> a) {
    return run(static_cast<A>(a));
  }

  template <class A>
  static Out run(A a) {
    if constexpr (is_floating<A>) {
      if constexpr (is_half<A>) {
        return from_float(static_cast<double>(to_float(a)));
      } else if constexpr (std::is_same_v<A, float>) {
        return from_float(static_cast<double>(Ftz ? flush(a) : a));
      } else {
        return from_float(a);
      }
    } else {
      return from_integer(a);
    }
  }

  static Out from_float(double v) {
    if constexpr (!is_floating<D>) {
      const double r = integral<R>(v);
      constexpr double low = static_cast<double>(std::numeric_limits<D>::min());
      constexpr double high = static_cast<double>(std::numeric_limits<D>::max());
      if (!(r == r)) return 0;
      if (r <= low) return static_cast<Out>(std::numeric_limits<D>::min());
      if (r >= high) return static_cast<Out>(std::numeric_limits<D>::max());
      return static_cast<Out>(static_cast<D>(r));
    } else {
      if (Integral) v = integral<R>(v);
      if (Sat) v = v > 0 ? (v < 1 ? v : 1.0) : 0.0;
      if constexpr (std::is_same_v<D, double>) {
        return v;
      } else if constexpr (std::is_same_v<D, float>) {
        const float f = to_single < Integral ? Rounding::Nearest : R > (v);
        return f != f ? kNan : Ftz ? flush(f) : f;
      } else {
        return to_half_type<D, R>(to_odd_float(v));
      }
    }
  }

  template <class A>
  static Out from_integer(A a) {
    if constexpr (std::is_same_v<D, double>) {
      return static_cast<double>(a);
    } else if constexpr (std::is_same_v<D, float>) {
      const float f = R == Rounding::Nearest ? static_cast<float>(a) : to_single<R>(a);
      return Sat ? std::clamp(f, 0.0f, 1.0f) : f;
    } else if constexpr (is_half<D>) {
      return to_half_type<D, R>(to_odd_float(static_cast<double>(a)));
    } else if constexpr (Sat) {
      const auto v = static_cast<i128>(a);
      const auto low = static_cast<i128>(std::numeric_limits<D>::min());
      const auto high = static_cast<i128>(std::numeric_limits<D>::max());
      return static_cast<Out>(static_cast<D>(v < low ? low : v > high ? high : v));
    } else {
      return static_cast<Out>(static_cast<D>(a));
    }
  }
};

using Everything = Types<u8, i8, u16, i16, u32, i32, u64, i64, float, double, Half, Bf16>;

// Register width decides how far an integer result is extended.
template <class D>
using Extended = std::conditional_t<std::is_signed_v<D>, i64, u64>;

// Only what the manual allows and a compiler emits is instantiated. `From` is A as the source
// register holds it.
template <class D, class Out, class A, class From>
Choice choose_rounding(const ptx::Instruction& i) {
  const bool sat = i.has("sat"), ftz = i.has("ftz");
  const auto pick = [&]<Rounding R, bool Integral>() -> Choice {
    constexpr bool single = std::is_same_v<D, float> || std::is_same_v<A, float>;
    if constexpr (single && (is_floating<D> == is_floating<A> || std::is_same_v<A, float>)) {
      if (ftz && !sat) return lanewise<Convert<D, Out, R, false, true, Integral>, Out, From>();
    }
    if constexpr (is_floating<D> == is_floating<A> && R == Rounding::Nearest) {
      if (sat && !ftz) return lanewise<Convert<D, Out, R, true, false, Integral>, Out, From>();
    }
    if (sat || (ftz && std::is_same_v<D, float>)) return {};
    return lanewise<Convert<D, Out, R, false, false, Integral>, Out, From>();
  };
  if constexpr (is_floating<A> && (!is_floating<D> || std::is_same_v<D, A>)) {
    if (i.has("rni")) return pick.template operator()<Rounding::Nearest, true>();
    if (i.has("rzi")) return pick.template operator()<Rounding::Zero, true>();
    if (i.has("rmi")) return pick.template operator()<Rounding::Down, true>();
    if (i.has("rpi")) return pick.template operator()<Rounding::Up, true>();
  }
  if constexpr (!is_floating<D> && is_floating<A>) {
    return {};  // the manual wants a rounding
  } else {
    constexpr bool directed = std::is_same_v<D, float> || (is_half<D> && std::is_same_v<A, float>);
    if constexpr (directed) {
      if (i.has("rz")) return pick.template operator()<Rounding::Zero, false>();
      if (i.has("rm")) return pick.template operator()<Rounding::Down, false>();
      if (i.has("rp")) return pick.template operator()<Rounding::Up, false>();
    } else if (i.has("rz") || i.has("rm") || i.has("rp")) {
      return {};
    }
    return pick.template operator()<Rounding::Nearest, false>();
  }
}

template <class D, class A, class From>
Choice choose_result(const ptx::Instruction& i) {
  if constexpr (is_floating<D>) {
    return choose_rounding<D, D, A, From>(i);
  } else {
    // args[0].value holds the bytes of the destination register (see decode).
    const u64 bytes = i.args.at(0).value;
    if (bytes == 8) return choose_rounding<D, Extended<D>, A, From>(i);
    if constexpr (sizeof(D) <= 2 && std::is_signed_v<D>) {
      if (bytes == 2) return choose_rounding<D, i16, A, From>(i);
    }
    if constexpr (sizeof(D) <= 4) {
      using Out = std::conditional_t<std::is_signed_v<D>, i32, u32>;
      return choose_rounding<D, Out, A, From>(i);
    }
    return {};
  }
}

struct RoundToTf32 {  // round to nearest, ties away from zero
  static u32 run(float a) {
    const u32 b = std::bit_cast<u32>(a);
    if ((b & 0x7f800000) == 0x7f800000) return (b & 0x7fffff) != 0 ? 0x7fffffff : b;
    return (b + 0x1000) & 0xffffe000;
  }
};
struct RoundToTf32Even {
  static u32 run(float a) {
    const u32 b = std::bit_cast<u32>(a);
    if ((b & 0x7f800000) == 0x7f800000) return (b & 0x7fffff) != 0 ? 0x7fffffff : b;
    return (b + 0xfff + (b >> 13 & 1)) & 0xffffe000;
  }
};
template <class T, Rounding R, bool Relu>
struct PackPair {  // the first source becomes the high half
  static Pair<T> run(float a, float b) { return {one(b), one(a)}; }
  static T one(float v) {
    if (Relu && v < 0) v = 0;
    return to_half_type<T, R>(v);
  }
};

template <class T>
Choice pack_pair(const ptx::Instruction& i) {
  if (!only(i, {"rn", "rz", "relu"}, 2)) return {};
  if (i.has("rz")) {
    return i.has("relu") ? lanewise<PackPair<T, Rounding::Zero, true>, Pair<T>, float, float>()
                         : lanewise<PackPair<T, Rounding::Zero, false>, Pair<T>, float, float>();
  }
  return i.has("relu") ? lanewise<PackPair<T, Rounding::Nearest, true>, Pair<T>, float, float>()
                       : lanewise<PackPair<T, Rounding::Nearest, false>, Pair<T>, float, float>();
}

}  // namespace

Choice convert_handler(const ptx::Instruction& i) {
  if (i.op[0] != "cvt" || i.op.size() < 3) return {};
  const std::string& to = i.op[i.op.size() - 2];
  const std::string& from = i.op.back();
  if (to == "tf32" && from == "f32" && i.op.size() == 4) {
    if (i.op[1] == "rna") return lanewise<RoundToTf32, u32, float>();
    if (i.op[1] == "rn") return lanewise<RoundToTf32Even, u32, float>();
    return {};
  }
  if (to == "bf16x2" && from == "f32") return pack_pair<Bf16>(i);
  if (to == "f16x2" && from == "f32") return pack_pair<Half>(i);
  if (!only(i, {"rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "ftz", "sat"}, 2)) return {};
  return with_type(Everything{}, to, [&]<class D>() {
    return with_type(Everything{}, from, [&]<class A>() -> Choice {
      // args[1].value holds the bytes of the source register, 0 for a constant (see decode).
      if constexpr (sizeof(A) < 8) {
        if (i.args.at(1).value == 8) return choose_result<D, A, Chopped<A>>(i);
      }
      return choose_result<D, A, A>(i);
    });
  });
}

}  // namespace cudasim
