#pragma once

#include <algorithm>
#include <bit>
#include <initializer_list>
#include <string_view>
#include <type_traits>

#include "tests/cudasim/exec/number.h"
#include "tests/cudasim/exec/warp.h"

namespace cudasim {

/// A handler and how its operands are stored, in PTX order: 4 for lanes of 32 bits (8- and 16-bit
/// types too, zero-extended), 8 for 64 bits, 1 for a predicate.
struct Choice {
  Handler run = nullptr;
  std::array<u8, 6> width{};
  explicit operator bool() const { return run != nullptr; }
};

template <class T>
using Stored = std::conditional_t<sizeof(T) == 8, u64, u32>;

template <class T>
inline T narrow(Stored<T> s) {
  if constexpr (sizeof(T) == sizeof(Stored<T>)) {
    return std::bit_cast<T>(s);
  } else if constexpr (sizeof(T) == 2) {
    return std::bit_cast<T>(static_cast<u16>(s));
  } else {
    return std::bit_cast<T>(static_cast<u8>(s));
  }
}

template <class T>
inline Stored<T> widen(T v) {
  if constexpr (sizeof(T) == sizeof(Stored<T>)) {
    return std::bit_cast<Stored<T>>(v);
  } else if constexpr (sizeof(T) == 2) {
    return std::bit_cast<u16>(v);
  } else {
    return std::bit_cast<u8>(v);
  }
}

template <class Op, class D, class A>
Step lanewise1(Warp& w, const Ins& i, u32 mask) {
  const auto* a = w.lanes<Stored<A>>(i.op[1]);
  each(w.lanes<Stored<D>>(i.op[0]), mask,
       [=](int l) { return widen<D>(Op::run(narrow<A>(a[l]))); });
  return Step::Next;
}

template <class Op, class D, class A, class B>
Step lanewise2(Warp& w, const Ins& i, u32 mask) {
  const auto* a = w.lanes<Stored<A>>(i.op[1]);
  const auto* b = w.lanes<Stored<B>>(i.op[2]);
  each(w.lanes<Stored<D>>(i.op[0]), mask,
       [=](int l) { return widen<D>(Op::run(narrow<A>(a[l]), narrow<B>(b[l]))); });
  return Step::Next;
}

template <class Op, class D, class A, class B, class C>
Step lanewise3(Warp& w, const Ins& i, u32 mask) {
  const auto* a = w.lanes<Stored<A>>(i.op[1]);
  const auto* b = w.lanes<Stored<B>>(i.op[2]);
  const auto* c = w.lanes<Stored<C>>(i.op[3]);
  each(w.lanes<Stored<D>>(i.op[0]), mask,
       [=](int l) { return widen<D>(Op::run(narrow<A>(a[l]), narrow<B>(b[l]), narrow<C>(c[l]))); });
  return Step::Next;
}

template <class Op, class D, class A, class B, class C, class E>
Step lanewise4(Warp& w, const Ins& i, u32 mask) {
  const auto* a = w.lanes<Stored<A>>(i.op[1]);
  const auto* b = w.lanes<Stored<B>>(i.op[2]);
  const auto* c = w.lanes<Stored<C>>(i.op[3]);
  const auto* e = w.lanes<Stored<E>>(i.op[4]);
  each(w.lanes<Stored<D>>(i.op[0]), mask, [=](int l) {
    return widen<D>(Op::run(narrow<A>(a[l]), narrow<B>(b[l]), narrow<C>(c[l]), narrow<E>(e[l])));
  });
  return Step::Next;
}

template <class T>
inline constexpr u8 kStoredWidth = sizeof(Stored<T>);

/// The choice for d = Op(operands…), given the types of d and of the operands.
template <class Op, class D, class... A>
Choice lanewise() {
  Choice c;
  c.width = {kStoredWidth<D>, kStoredWidth<A>...};
  if constexpr (sizeof...(A) == 1) {
    c.run = &lanewise1<Op, D, A...>;
  } else if constexpr (sizeof...(A) == 2) {
    c.run = &lanewise2<Op, D, A...>;
  } else if constexpr (sizeof...(A) == 3) {
    c.run = &lanewise3<Op, D, A...>;
  } else {
    c.run = &lanewise4<Op, D, A...>;
  }
  return c;
}

template <class... T>
struct Types {};

template <class T>
constexpr bool is_type(std::string_view name) {
  if constexpr (std::is_same_v<T, u8>) return name == "u8" || name == "b8";
  if constexpr (std::is_same_v<T, i8>) return name == "s8";
  if constexpr (std::is_same_v<T, u16>) return name == "u16" || name == "b16";
  if constexpr (std::is_same_v<T, i16>) return name == "s16";
  if constexpr (std::is_same_v<T, u32>) return name == "u32" || name == "b32";
  if constexpr (std::is_same_v<T, i32>) return name == "s32";
  if constexpr (std::is_same_v<T, u64>) return name == "u64" || name == "b64";
  if constexpr (std::is_same_v<T, i64>) return name == "s64";
  if constexpr (std::is_same_v<T, float>) return name == "f32";
  if constexpr (std::is_same_v<T, double>) return name == "f64";
  if constexpr (std::is_same_v<T, Half>) return name == "f16";
  if constexpr (std::is_same_v<T, Bf16>) return name == "bf16";
  if constexpr (std::is_same_v<T, Pair<Half>>) return name == "f16x2";
  if constexpr (std::is_same_v<T, Pair<Bf16>>) return name == "bf16x2";
  return false;
}

/// f<T>() for the T of the list that PTX calls `name`; an empty result if there is none.
template <class... T, class F>
auto with_type(Types<T...>, std::string_view name, F f) {
  using Result = std::common_type_t<decltype(f.template operator()<T>())...>;
  Result result{};
  (void)((is_type<T>(name) && (result = f.template operator()<T>(), true)) || ...);
  return result;
}

using Integers = Types<u16, i16, u32, i32, u64, i64>;
using Words = Types<u16, u32, u64>;

/// True if all modifiers but the last `types` ones are among `known`.
inline bool only(const ptx::Instruction& i, std::initializer_list<std::string_view> known,
                 std::size_t types = 1) {
  for (std::size_t k = 1; k + types < i.op.size(); ++k) {
    if (std::find(known.begin(), known.end(), i.op[k]) == known.end()) return false;
  }
  return true;
}

// Families; each returns an empty choice for what it does not know.
Choice integer_handler(const ptx::Instruction& i);   // alu_integer.cc
Choice bits_handler(const ptx::Instruction& i);      // alu_bits.cc
Choice float_handler(const ptx::Instruction& i);     // alu_float.cc
Choice function_handler(const ptx::Instruction& i);  // alu_functions.cc
Choice half_handler(const ptx::Instruction& i);      // alu_half.cc
Choice compare_handler(const ptx::Instruction& i);   // alu_compare.cc
Choice convert_handler(const ptx::Instruction& i);   // alu_convert.cc
Choice move_handler(const ptx::Instruction& i);      // alu_move.cc

// mov of a vector into a register and back: bytes of the registers. alu_move.cc
Handler pack_handler(u64 whole, u64 part);
Handler unpack_handler(u64 whole, u64 part);
/// mov from %clock and the like; null for another name. Sets Ins::flags.
Handler clock_handler(std::string_view name, u32& flags);

}  // namespace cudasim
