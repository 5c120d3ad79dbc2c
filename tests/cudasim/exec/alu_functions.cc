#include "tests/cudasim/exec/lanewise.h"

namespace cudasim {
namespace {

// The approximations of the manual (section "Floating Point Instructions"): results here are the
// rounded ones, well inside the error the manual grants, but not the bits of a device.

struct DivideApprox {  // at most 2 ulp for |b| in [2^-126, 2^126]
  static float run(float a, float b) {
    // For |b| in (2^126, 2^128) the manual gives 0.
    const u32 exponent = std::bit_cast<u32>(b) & 0x7fffffff;
    if (exponent > 0x7e800000 && exponent < 0x7f800000) {
      return std::isinf(a) ? kNan : std::copysign(0.0f, a) * std::copysign(1.0f, b);
    }
    return a / b;
  }
};
struct DivideFull {  // at most 2 ulp, full range
  static float run(float a, float b) { return a / b; }
};
struct Reciprocal {  // at most 1 ulp
  static float run(float a) { return 1.0f / a; }
};
struct SquareRoot {
  static float run(float a) { return std::sqrt(a); }
};
struct InverseRoot {  // relative error 2^-22.9
  static float run(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
  static double run(double a) { return 1.0 / std::sqrt(a); }
};
struct Sine {  // absolute error 2^-20.5 in [-π, π]
  static float run(float a) { return std::sin(a); }
};
struct Cosine {
  static float run(float a) { return std::cos(a); }
};
struct Log2 {
  static float run(float a) { return std::log2(a); }
};
struct Exp2 {  // relative error 2^-22.5
  static float run(float a) { return std::exp2(a); }
};
struct Tanh {  // relative error 2^-11
  static float run(float a) { return std::tanh(a); }
};

template <class Op, bool Ftz>
struct Flushed {
  template <class... A>
  static float run(A... a) {
    const float r = Ftz ? flush(Op::run(flush(a)...)) : Op::run(a...);
    return r != r ? kNan : r;
  }
};
template <class Op, class T>
struct OfHalf {
  static T run(T a) { return half_from<T>(Op::run(to_float(a))); }
};
template <class Op, class T>
struct OfPair {
  static Pair<T> run(Pair<T> a) { return {OfHalf<Op, T>::run(a.low), OfHalf<Op, T>::run(a.high)}; }
};

template <class Op, class... A>
Choice maybe_flushed(bool ftz) {
  return ftz ? lanewise<Flushed<Op, true>, float, A...>()
             : lanewise<Flushed<Op, false>, float, A...>();
}

template <class Op>
Choice of_halves(std::string_view type) {
  if (type == "f16") return lanewise<OfHalf<Op, Half>, Half, Half>();
  if (type == "bf16") return lanewise<OfHalf<Op, Bf16>, Bf16, Bf16>();
  if (type == "f16x2") return lanewise<OfPair<Op, Half>, Pair<Half>, Pair<Half>>();
  if (type == "bf16x2") return lanewise<OfPair<Op, Bf16>, Pair<Bf16>, Pair<Bf16>>();
  return {};
}

}  // namespace

Choice function_handler(const ptx::Instruction& i) {
  const std::string& op = i.op[0];
  const std::string& type = i.op.back();
  if (op == "div" && i.has("full") && only(i, {"full", "ftz"}) && type == "f32") {
    return maybe_flushed<DivideFull, float, float>(i.has("ftz"));
  }
  if (!i.has("approx") || !only(i, {"approx", "ftz"})) return {};
  const bool ftz = i.has("ftz");
  if (type == "f64" && op == "rsqrt") return lanewise<InverseRoot, double, double>();
  if (type == "f32") {
    if (op == "div") return maybe_flushed<DivideApprox, float, float>(ftz);
    if (op == "rcp") return maybe_flushed<Reciprocal, float>(ftz);
    if (op == "sqrt") return maybe_flushed<SquareRoot, float>(ftz);
    if (op == "rsqrt") return maybe_flushed<InverseRoot, float>(ftz);
    if (op == "sin") return maybe_flushed<Sine, float>(ftz);
    if (op == "cos") return maybe_flushed<Cosine, float>(ftz);
    if (op == "lg2") return maybe_flushed<Log2, float>(ftz);
    if (op == "ex2") return maybe_flushed<Exp2, float>(ftz);
    if (op == "tanh" && !ftz) return maybe_flushed<Tanh, float>(false);
    return {};
  }
  if (op == "ex2") return of_halves<Exp2>(type);
  if (op == "tanh" && !ftz) return of_halves<Tanh>(type);
  return {};
}

}  // namespace cudasim
