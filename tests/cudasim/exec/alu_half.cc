#include "tests/cudasim/exec/lanewise.h"

namespace cudasim {
namespace {

// Sums, differences and products of halves are rounded once: float has more than twice the bits
// and two, so rounding its result again changes nothing. Only fma needs the odd rounding.

struct Add {
  template <class T>
  static T run(T a, T b) {
    return half_from<T>(to_float(a) + to_float(b));
  }
};
struct Subtract {
  template <class T>
  static T run(T a, T b) {
    return half_from<T>(to_float(a) - to_float(b));
  }
};
struct Multiply {
  template <class T>
  static T run(T a, T b) {
    return half_from<T>(to_float(a) * to_float(b));
  }
};
struct Fma {
  template <class T>
  static T run(T a, T b, T c) {
    return half_from<T>(to_odd_float(fma_to_odd(to_float(a), to_float(b), to_float(c))));
  }
};
struct FmaRelu {
  template <class T>
  static T run(T a, T b, T c) {
    const T r = Fma::run(a, b, c);
    const float f = to_float(r);
    return f != f ? r : f > 0 ? r : T{0};
  }
};
template <class Op>
struct Saturated {
  template <class... T>
  static auto run(T... a) {
    const auto r = Op::run(a...);
    const float f = to_float(r);
    return half_from<std::remove_const_t<decltype(r)>>(f > 0 ? (f < 1 ? f : 1.0f) : 0.0f);
  }
};
struct Negate {
  template <class T>
  static T run(T a) {
    return {static_cast<u16>(a.bits ^ 0x8000)};
  }
};
struct Absolute {
  template <class T>
  static T run(T a) {
    return {static_cast<u16>(a.bits & 0x7fff)};
  }
};
template <bool Greatest, bool NanWins>
struct Extreme {
  template <class T>
  static T run(T a, T b) {
    const float x = to_float(a), y = to_float(b);
    if (x != x && y != y) return {0x7fff};
    if (x != x) return NanWins ? T{0x7fff} : b;
    if (y != y) return NanWins ? T{0x7fff} : a;
    if (x == y) return ((a.bits & 0x8000) != 0) == Greatest ? b : a;
    return (x > y) == Greatest ? a : b;
  }
};

template <class Op, class T>
struct InPair {
  template <class... A>
  static Pair<T> run(A... a) {
    return {Op::run(a.low...), Op::run(a.high...)};
  }
};

template <class Op, int N>
Choice halves(std::string_view type) {
  const auto choose = [&]<class T>() {
    if constexpr (N == 1) return lanewise<Op, T, T>();
    if constexpr (N == 2) return lanewise<Op, T, T, T>();
    if constexpr (N == 3) return lanewise<Op, T, T, T, T>();
  };
  const auto choose_pair = [&]<class T>() {
    using P = Pair<T>;
    if constexpr (N == 1) return lanewise<InPair<Op, T>, P, P>();
    if constexpr (N == 2) return lanewise<InPair<Op, T>, P, P, P>();
    if constexpr (N == 3) return lanewise<InPair<Op, T>, P, P, P, P>();
  };
  if (type == "f16") return choose.template operator()<Half>();
  if (type == "bf16") return choose.template operator()<Bf16>();
  if (type == "f16x2") return choose_pair.template operator()<Half>();
  if (type == "bf16x2") return choose_pair.template operator()<Bf16>();
  return {};
}

template <class Op, int N>
Choice maybe_saturated(const ptx::Instruction& i) {
  return i.has("sat") ? halves<Saturated<Op>, N>(i.op.back()) : halves<Op, N>(i.op.back());
}

}  // namespace

Choice half_handler(const ptx::Instruction& i) {
  const std::string& op = i.op[0];
  const std::string& type = i.op.back();
  if (i.has("ftz")) return {};  // subnormal halves are never flushed here
  if (op == "min" || op == "max") {
    if (!only(i, {"NaN"})) return {};
    if (op == "min") {
      return i.has("NaN") ? halves<Extreme<false, true>, 2>(type)
                          : halves<Extreme<false, false>, 2>(type);
    }
    return i.has("NaN") ? halves<Extreme<true, true>, 2>(type)
                        : halves<Extreme<true, false>, 2>(type);
  }
  if (op == "fma" && i.has("relu") && only(i, {"rn", "relu"})) return halves<FmaRelu, 3>(type);
  if (!only(i, {"rn", "sat"})) return {};
  if (op == "add") return maybe_saturated<Add, 2>(i);
  if (op == "sub") return maybe_saturated<Subtract, 2>(i);
  if (op == "mul") return maybe_saturated<Multiply, 2>(i);
  if (op == "fma") return maybe_saturated<Fma, 3>(i);
  if (op == "neg") return halves<Negate, 1>(type);
  if (op == "abs") return halves<Absolute, 1>(type);
  return {};
}

}  // namespace cudasim
