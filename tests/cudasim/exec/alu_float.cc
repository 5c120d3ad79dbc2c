#include "tests/cudasim/exec/lanewise.h"

namespace cudasim {
namespace {

enum class Rounding { Nearest, Zero, Down, Up };

// v, rounded to odd in double, as a float. The odd rounding keeps on which side of a float v was.
template <Rounding R>
float rounded(double v) {
  const float f = static_cast<float>(v);
  if (R == Rounding::Nearest || static_cast<double>(f) == v || !(v - v == 0)) return f;
  const bool above = static_cast<double>(f) > v;
  const bool want_below = R == Rounding::Down || (R == Rounding::Zero && v > 0);
  if (above == want_below) {
    return std::nextafter(f, want_below ? -std::numeric_limits<float>::infinity()
                                        : std::numeric_limits<float>::infinity());
  }
  return f;
}

template <Rounding R>
struct Add {
  static float run(float a, float b) {
    if constexpr (R == Rounding::Nearest) return a + b;
    return rounded<R>(fma_to_odd(a, 1.0, b));
  }
  static double run(double a, double b) { return a + b; }
};
template <Rounding R>
struct Subtract {
  template <class T>
  static T run(T a, T b) {
    return Add<R>::run(a, -b);
  }
};
template <Rounding R>
struct Multiply {
  static float run(float a, float b) {
    if constexpr (R == Rounding::Nearest) return a * b;
    return rounded<R>(static_cast<double>(a) * b);
  }
  static double run(double a, double b) { return a * b; }
};
template <Rounding R>
struct Fma {
  static float run(float a, float b, float c) {
    if constexpr (R == Rounding::Nearest) return std::fma(a, b, c);
    return rounded<R>(fma_to_odd(a, b, c));
  }
  static double run(double a, double b, double c) { return std::fma(a, b, c); }
};
struct Divide {
  template <class T>
  static T run(T a, T b) {
    return a / b;
  }
};
struct Reciprocal {
  template <class T>
  static T run(T a) {
    return T{1} / a;
  }
};
struct SquareRoot {
  template <class T>
  static T run(T a) {
    return std::sqrt(a);
  }
};
// Of a number and a NaN the number; -0 is less than +0.
struct Least {
  template <class T>
  static T run(T a, T b) {
    const T least = a < b || (a == b && std::signbit(a)) ? a : b;
    return a != a ? b : b != b ? a : least;
  }
};
struct Greatest {
  template <class T>
  static T run(T a, T b) {
    const T greatest = a > b || (a == b && !std::signbit(a)) ? a : b;
    return a != a ? b : b != b ? a : greatest;
  }
};
template <class Op>
struct NanWins {
  static float run(float a, float b) { return a != a || b != b ? kNan : Op::run(a, b); }
};
template <class Op>
struct SignOfBoth {  // .xorsign.abs
  static float run(float a, float b) {
    const u32 sign = (std::bit_cast<u32>(a) ^ std::bit_cast<u32>(b)) & 0x80000000u;
    const float r = Op::run(std::fabs(a), std::fabs(b));
    return std::bit_cast<float>((std::bit_cast<u32>(r) & 0x7fffffffu) | sign);
  }
};
struct Least3 {
  static float run(float a, float b, float c) { return Least::run(Least::run(a, b), c); }
};
struct Greatest3 {
  static float run(float a, float b, float c) { return Greatest::run(Greatest::run(a, b), c); }
};
struct Absolute {
  template <class T>
  static T run(T a) {
    return std::fabs(a);
  }
};
struct Negate {
  template <class T>
  static T run(T a) {
    return -a;
  }
};
struct CopySign {  // of a to b
  template <class T>
  static T run(T a, T b) {
    return std::copysign(b, a);
  }
};

/// Op with its inputs and output flushed, saturated to [0, 1] (NaN becomes 0), NaN canonical.
template <class Op, bool Ftz, bool Sat>
struct Shaped {
  template <class... A>
  static float run(A... a) {
    float r = Ftz ? flush(Op::run(flush(a)...)) : Op::run(a...);
    if (Sat) return r > 0 ? (r < 1 ? r : 1.0f) : 0.0f;
    return r != r ? kNan : r;
  }
};

template <class Op, class... A>
Choice shaped(bool ftz, bool sat) {
  if (ftz) {
    return sat ? lanewise<Shaped<Op, true, true>, float, A...>()
               : lanewise<Shaped<Op, true, false>, float, A...>();
  }
  return sat ? lanewise<Shaped<Op, false, true>, float, A...>()
             : lanewise<Shaped<Op, false, false>, float, A...>();
}

template <template <Rounding> class Op, class... A>
Choice rounding_choice(const ptx::Instruction& i, bool ftz, bool sat) {
  if (i.has("rz")) return shaped<Op<Rounding::Zero>, A...>(ftz, sat);
  if (i.has("rm")) return shaped<Op<Rounding::Down>, A...>(ftz, sat);
  if (i.has("rp")) return shaped<Op<Rounding::Up>, A...>(ftz, sat);
  return shaped<Op<Rounding::Nearest>, A...>(ftz, sat);
}

template <class Op>
Choice least_or_greatest(const ptx::Instruction& i, bool ftz) {
  if (!only(i, {"ftz", "NaN", "xorsign", "abs"})) return {};
  if (i.has("xorsign")) {
    return i.has("NaN") ? shaped<SignOfBoth<NanWins<Op>>, float, float>(ftz, false)
                        : shaped<SignOfBoth<Op>, float, float>(ftz, false);
  }
  return i.has("NaN") ? shaped<NanWins<Op>, float, float>(ftz, false)
                      : shaped<Op, float, float>(ftz, false);
}

Choice single(const ptx::Instruction& i) {
  const std::string& op = i.op[0];
  const bool ftz = i.has("ftz"), sat = i.has("sat");
  if (op == "min" && i.args.size() == 4 && i.op.size() == 2) {
    return lanewise<Shaped<Least3, false, false>, float, float, float, float>();
  }
  if (op == "max" && i.args.size() == 4 && i.op.size() == 2) {
    return lanewise<Shaped<Greatest3, false, false>, float, float, float, float>();
  }
  if (op == "min") return least_or_greatest<Least>(i, ftz);
  if (op == "max") return least_or_greatest<Greatest>(i, ftz);
  if (op == "abs" && only(i, {"ftz"})) {
    return ftz ? shaped<Absolute, float>(true, false) : lanewise<Absolute, float, float>();
  }
  if (op == "neg" && only(i, {"ftz"})) {
    return ftz ? shaped<Negate, float>(true, false) : lanewise<Negate, float, float>();
  }
  if (op == "copysign" && i.op.size() == 2) return lanewise<CopySign, float, float, float>();
  if (!only(i, {"rn", "rz", "rm", "rp", "ftz", "sat"})) return {};
  if (op == "add") return rounding_choice<Add, float, float>(i, ftz, sat);
  if (op == "sub") return rounding_choice<Subtract, float, float>(i, ftz, sat);
  if (op == "mul") return rounding_choice<Multiply, float, float>(i, ftz, sat);
  if (op == "fma" || op == "mad") return rounding_choice<Fma, float, float, float>(i, ftz, sat);
  if (!i.has("rn") || sat) return {};
  if (op == "div") return shaped<Divide, float, float>(ftz, false);
  if (op == "rcp") return shaped<Reciprocal, float>(ftz, false);
  if (op == "sqrt") return shaped<SquareRoot, float>(ftz, false);
  return {};
}

Choice twice(const ptx::Instruction& i) {
  const std::string& op = i.op[0];
  if (!only(i, {"rn"})) return {};
  if (op == "add") return lanewise<Add<Rounding::Nearest>, double, double, double>();
  if (op == "sub") return lanewise<Subtract<Rounding::Nearest>, double, double, double>();
  if (op == "mul") return lanewise<Multiply<Rounding::Nearest>, double, double, double>();
  if (op == "fma" || op == "mad") {
    return lanewise<Fma<Rounding::Nearest>, double, double, double, double>();
  }
  if (op == "div") return lanewise<Divide, double, double, double>();
  if (op == "rcp") return lanewise<Reciprocal, double, double>();
  if (op == "sqrt") return lanewise<SquareRoot, double, double>();
  if (op == "min") return lanewise<Least, double, double, double>();
  if (op == "max") return lanewise<Greatest, double, double, double>();
  if (op == "abs") return lanewise<Absolute, double, double>();
  if (op == "neg") return lanewise<Negate, double, double>();
  if (op == "copysign") return lanewise<CopySign, double, double, double>();
  return {};
}

}  // namespace

Choice float_handler(const ptx::Instruction& i) {
  if (i.op.back() == "f32") return single(i);
  if (i.op.back() == "f64") return twice(i);
  return {};
}

}  // namespace cudasim
