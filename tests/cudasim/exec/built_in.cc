#include <cstdio>

#include "tests/cudasim/exec/collective.h"
#include "tests/cudasim/exec/memory_ops.h"

namespace cudasim {
namespace {

// Ins::targets: local offsets of the results and arguments, 8 bytes each.
u64 argument(const Warp& w, int lane, const Ins& i, std::size_t k) {
  const u64 frame = w.launch->program->local_bytes;
  u64 value = 0;
  std::memcpy(&value, w.block->local.data() + w.thread(lane) * frame + i.targets->at(k),
              sizeof value);
  return value;
}

u8 byte_at(Warp& w, int lane, u64 generic) {
  if (generic - kLocalWindow < kWindowBytes) {
    const u64 frame = w.launch->program->local_bytes, at = generic - kLocalWindow;
    if (at >= frame) throw Fault{Finding::OutOfBounds, lane, "argument outside local memory"};
    return static_cast<u8>(w.block->local[w.thread(lane) * frame + at]);
  }
  if (generic - kSharedWindow < kWindowBytes) {
    return static_cast<u8>(
        *check_shared(w, lane, generic - kSharedWindow, 1, false, false, nullptr));
  }
  check_global(w, lane, generic, 1, false, false, nullptr, kPlain);
  return *reinterpret_cast<const u8*>(generic);
}

template <class T>
T value_at(Warp& w, int lane, u64 generic) {
  std::array<u8, sizeof(T)> bytes;
  for (std::size_t k = 0; k < sizeof(T); ++k) bytes[k] = byte_at(w, lane, generic + k);
  return std::bit_cast<T>(bytes);
}

std::string text_at(Warp& w, int lane, u64 generic) {
  std::string text;
  while (const u8 c = byte_at(w, lane, generic++)) text += static_cast<char>(c);
  return text;
}

template <class T>
std::string formatted(const std::string& format, T value) {
  char buffer[512];
  // The format is the kernel's own, one conversion of it, and `value` is of its type.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
  std::snprintf(buffer, sizeof buffer, format.c_str(), value);
#pragma GCC diagnostic pop
  return buffer;
}

// printf of the manual: arguments lie one after the other, each aligned to its size; floats came as
// doubles.
std::string print(Warp& w, int lane, const std::string& format, u64 arguments) {
  std::string out;
  u64 at = arguments;
  const auto take = [&]<class T>(T) {
    at = (at + sizeof(T) - 1) / sizeof(T) * sizeof(T);
    const T v = value_at<T>(w, lane, at);
    at += sizeof(T);
    return v;
  };
  for (std::size_t k = 0; k < format.size(); ++k) {
    if (format[k] != '%') {
      out += format[k];
      continue;
    }
    std::size_t end = format.find_first_of("%diouxXcspfFeEgGaA", k + 1);
    if (end == std::string::npos) break;
    const std::string one = format.substr(k, end - k + 1);
    const bool wide = one.find('l') != std::string::npos;
    k = end;
    switch (format[end]) {
      case '%':
        out += '%';
        break;
      case 's':
        out += formatted(one, text_at(w, lane, take(u64{})).c_str());
        break;
      case 'p':
        out += formatted(one, reinterpret_cast<void*>(take(u64{})));
        break;
      case 'c':
        out += formatted(one, take(i32{}));
        break;
      case 'd':
      case 'i':
      case 'o':
      case 'u':
      case 'x':
      case 'X':
        out += wide ? formatted(one, take(i64{})) : formatted(one, take(i32{}));
        break;
      default:
        out += formatted(one, take(double{}));
    }
  }
  return out;
}

Step print_formatted(Warp& w, const Ins& i, u32 mask) {
  for_lanes(mask, [&](int l) {
    const std::string text = print(w, l, text_at(w, l, argument(w, l, i, 1)), argument(w, l, i, 2));
    const std::lock_guard lock(w.launch->mutex);
    w.launch->output += text;
  });
  return Step::Next;
}

Step assertion(Warp& w, const Ins& i, u32 mask) {
  const int l = std::countr_zero(mask);
  const u32 line = static_cast<u32>(argument(w, l, i, 2));
  throw Fault{
      Finding::Assertion, l,
      fmt::format("{}:{}: {}: assertion `{}' failed", text_at(w, l, argument(w, l, i, 1)), line,
                  text_at(w, l, argument(w, l, i, 3)), text_at(w, l, argument(w, l, i, 0)))};
}

}  // namespace

Handler built_in_handler(std::string_view name) {
  if (name == "vprintf") return &print_formatted;
  if (name == "__assertfail") return &assertion;
  return nullptr;
}

}  // namespace cudasim
