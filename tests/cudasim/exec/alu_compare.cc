#include "tests/cudasim/exec/lanewise.h"
#include "tests/cudasim/ptx/parser.h"

namespace cudasim {
namespace {

// Ins::flags of setp: how the comparison combines with a predicate.
enum Combine : u32 { kAlone = 0, kAnd = 1, kOr = 2, kXor = 3 };

struct Equal {
  template <class T>
  static bool run(T a, T b) {
    return a == b;
  }
};
struct NotEqual {  // ordered: false with a NaN
  template <class T>
  static bool run(T a, T b) {
    return a < b || a > b;
  }
};
struct Less {
  template <class T>
  static bool run(T a, T b) {
    return a < b;
  }
};
struct LessEqual {
  template <class T>
  static bool run(T a, T b) {
    return a <= b;
  }
};
struct Greater {
  template <class T>
  static bool run(T a, T b) {
    return a > b;
  }
};
struct GreaterEqual {
  template <class T>
  static bool run(T a, T b) {
    return a >= b;
  }
};
template <class Op>
struct OrNan {
  template <class T>
  static bool run(T a, T b) {
    return a != a || b != b || Op::run(a, b);
  }
};
struct Ordered {
  template <class T>
  static bool run(T a, T b) {
    return a == a && b == b;
  }
};
struct Unordered {
  template <class T>
  static bool run(T a, T b) {
    return a != a || b != b;
  }
};
template <class Op>
struct WithFlush {
  static bool run(float a, float b) { return Op::run(flush(a), flush(b)); }
};

template <class T>
auto number(T v) {
  if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, Bf16>) {
    return to_float(v);
  } else {
    return v;
  }
}

u32 combined(u32 combine, u32 result, u32 with) {
  switch (combine) {
    case kAnd:
      return result & with;
    case kOr:
      return result | with;
    case kXor:
      return result ^ with;
    default:
      return result;
  }
}

void store(Warp& w, const Ins& i, u32 mask, u32 result, u32 other) {
  u32 with = 0;
  if ((i.flags & 3) != kAlone) {
    with = w.predicate(i.op[4]);
    if ((i.flags & 4) != 0) with = ~with;
  }
  w.set_predicate(i.op[0], combined(i.flags & 3, result, with), mask);
  if (i.op[1] != kNowhere) w.set_predicate(i.op[1], combined(i.flags & 3, other, with), mask);
}

template <class Op, class T>
Step setp(Warp& w, const Ins& i, u32 mask) {
  const auto* a = w.lanes<Stored<T>>(i.op[2]);
  const auto* b = w.lanes<Stored<T>>(i.op[3]);
  u32 result = 0;
  for (int l = 0; l < kLanes; ++l) {
    const bool r = Op::run(number(narrow<T>(a[l])), number(narrow<T>(b[l])));
    result |= static_cast<u32>(r) << l;
  }
  store(w, i, mask, result, ~result);
  return Step::Next;
}

template <class Op, class T>
Step setp_pair(Warp& w, const Ins& i, u32 mask) {
  const u32* a = w.lanes<u32>(i.op[2]);
  const u32* b = w.lanes<u32>(i.op[3]);
  u32 low = 0, high = 0;
  for (int l = 0; l < kLanes; ++l) {
    const auto x = narrow<Pair<T>>(a[l]), y = narrow<Pair<T>>(b[l]);
    low |= static_cast<u32>(Op::run(to_float(x.low), to_float(y.low))) << l;
    high |= static_cast<u32>(Op::run(to_float(x.high), to_float(y.high))) << l;
  }
  store(w, i, mask, low, high);
  return Step::Next;
}

// set: all ones or zero for integer results, 1.0 or 0.0 for float ones.
template <class Op, class D>
struct SetTo {
  template <class T>
  static D run(T a, T b) {
    const bool r = Op::run(number(a), number(b));
    if constexpr (std::is_same_v<D, float>) {
      return r ? 1.0f : 0.0f;
    } else if constexpr (std::is_same_v<D, Half> || std::is_same_v<D, Bf16>) {
      return half_from<D>(r ? 1.0f : 0.0f);
    } else {
      return r ? ~D{0} : D{0};
    }
  }
};
template <class Op, class D>
struct SetPair {
  template <class T>
  static auto run(Pair<T> a, Pair<T> b) {
    if constexpr (std::is_same_v<D, u32>) {
      return (Op::run(to_float(a.low), to_float(b.low)) ? 0xffffu : 0u) |
             (Op::run(to_float(a.high), to_float(b.high)) ? 0xffff0000u : 0u);
    } else {
      return Pair<T>{SetTo<Op, T>::run(a.low, b.low), SetTo<Op, T>::run(a.high, b.high)};
    }
  }
};

/// f<Op>() for the comparison that PTX calls `name`, of type `type`.
template <class F>
Choice with_comparison(std::string_view name, bool is_float, bool is_unsigned, F f) {
  if (name == "eq") return f.template operator()<Equal>();
  if (name == "ne") return f.template operator()<NotEqual>();
  if (name == "lt" || (is_unsigned && name == "lo")) return f.template operator()<Less>();
  if (name == "le" || (is_unsigned && name == "ls")) return f.template operator()<LessEqual>();
  if (name == "gt" || (is_unsigned && name == "hi")) return f.template operator()<Greater>();
  if (name == "ge" || (is_unsigned && name == "hs")) return f.template operator()<GreaterEqual>();
  if (!is_float) return {};
  if (name == "equ") return f.template operator()<OrNan<Equal>>();
  if (name == "neu") return f.template operator()<OrNan<NotEqual>>();
  if (name == "ltu") return f.template operator()<OrNan<Less>>();
  if (name == "leu") return f.template operator()<OrNan<LessEqual>>();
  if (name == "gtu") return f.template operator()<OrNan<Greater>>();
  if (name == "geu") return f.template operator()<OrNan<GreaterEqual>>();
  if (name == "num") return f.template operator()<Ordered>();
  if (name == "nan") return f.template operator()<Unordered>();
  return {};
}

bool is_float_type(const std::string& t) { return t[0] == 'f' || t.starts_with("bf"); }

Choice set_predicate(const ptx::Instruction& i) {
  const std::string& type = i.op.back();
  for (std::size_t k = 2; k + 1 < i.op.size(); ++k) {
    if (i.op[k] != "and" && i.op[k] != "or" && i.op[k] != "xor" && i.op[k] != "ftz") return {};
  }
  const bool ftz = i.has("ftz");
  return with_comparison(i.op[1], is_float_type(type), type[0] == 'u', [&]<class Op>() -> Choice {
    if (type == "f16x2") return {&setp_pair<Op, Half>, {1, 1, 4, 4, 1}};
    if (type == "bf16x2") return {&setp_pair<Op, Bf16>, {1, 1, 4, 4, 1}};
    if (type == "f32" && ftz) return {&setp<WithFlush<Op>, float>, {1, 1, 4, 4, 1}};
    return with_type(Types<u16, i16, u32, i32, u64, i64, float, double, Half, Bf16>{}, type,
                     []<class T>() -> Choice {
                       constexpr u8 w = kStoredWidth<T>;
                       return {&setp<Op, T>, {1, 1, w, w, 1}};
                     });
  });
}

Choice set_value(const ptx::Instruction& i) {
  if (i.op.size() != 4) return {};
  const std::string& to = i.op[2];
  const std::string& type = i.op[3];
  return with_comparison(i.op[1], is_float_type(type), type[0] == 'u', [&]<class Op>() -> Choice {
    if (type == "f16x2" && to == "f16x2") {
      return lanewise<SetPair<Op, Half>, Pair<Half>, Pair<Half>, Pair<Half>>();
    }
    if (type == "bf16x2" && to == "bf16x2") {
      return lanewise<SetPair<Op, Bf16>, Pair<Bf16>, Pair<Bf16>, Pair<Bf16>>();
    }
    if (type == "f16x2" && to == "u32") {
      return lanewise<SetPair<Op, u32>, u32, Pair<Half>, Pair<Half>>();
    }
    if (type == "bf16x2" && to == "u32") {
      return lanewise<SetPair<Op, u32>, u32, Pair<Bf16>, Pair<Bf16>>();
    }
    if (type == "f16" && to == "f16") return lanewise<SetTo<Op, Half>, Half, Half, Half>();
    if (type == "bf16" && to == "bf16") return lanewise<SetTo<Op, Bf16>, Bf16, Bf16, Bf16>();
    return with_type(Types<u32, i32, u64, i64, float, double>{}, type, [&]<class T>() -> Choice {
      if (to == "f32") return lanewise<SetTo<Op, float>, float, T, T>();
      if (to == "u32" || to == "s32") {
        return lanewise<SetTo<Op, u32>, u32, T, T>();
      }
      return {};
    });
  });
}

template <class S>
Step select(Warp& w, const Ins& i, u32 mask) {
  const S* a = w.lanes<S>(i.op[1]);
  const S* b = w.lanes<S>(i.op[2]);
  const u32 p = w.predicate(i.op[3]);
  each(w.lanes<S>(i.op[0]), mask, [=](int l) { return (p >> l & 1) != 0 ? a[l] : b[l]; });
  return Step::Next;
}

struct SelectBySign {
  template <class T>
  static T run(T a, T b, i32 c) {
    return c >= 0 ? a : b;
  }
  template <class T>
  static T run(T a, T b, float c) {
    return c >= 0 ? a : b;
  }
};

}  // namespace

Choice compare_handler(const ptx::Instruction& i) {
  const std::string& op = i.op[0];
  if (op == "setp" && i.op.size() >= 3) return set_predicate(i);
  if (op == "set") return set_value(i);
  if (op == "selp" && i.op.size() == 2) {
    const u64 bytes = ptx::type_size(i.op[1]);
    if (bytes == 8) return {&select<u64>, {8, 8, 8, 1}};
    if (bytes <= 4) return {&select<u32>, {4, 4, 4, 1}};
  }
  if (op == "slct" && i.op.size() == 3) {
    const bool by_float = i.op[2] == "f32";
    if (!by_float && i.op[2] != "s32") return {};
    return with_type(Types<u32, i32, u64, i64, float, double>{}, i.op[1], [&]<class T>() -> Choice {
      return by_float ? lanewise<SelectBySign, T, T, T, float>()
                      : lanewise<SelectBySign, T, T, T, i32>();
    });
  }
  return {};
}

}  // namespace cudasim
