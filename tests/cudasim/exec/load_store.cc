#include "tests/cudasim/exec/memory_ops.h"
#include "tests/cudasim/exec/race.h"

namespace cudasim {

void addresses(const Warp& w, const Ins& i, u64* a) {
  const auto offset = static_cast<u64>(i.imm);
  if ((i.flags & kNoBase) != 0) {
    for (int l = 0; l < kLanes; ++l) a[l] = offset;
  } else if ((i.flags & kAddress32) != 0) {
    const u32* base = w.lanes<u32>(i.op[1]);
    for (int l = 0; l < kLanes; ++l) a[l] = static_cast<u32>(base[l] + offset);
  } else {
    const u64* base = w.lanes<u64>(i.op[1]);
    for (int l = 0; l < kLanes; ++l) a[l] = base[l] + offset;
  }
}

namespace {

using Buffer = std::array<std::byte, kLanes * 32>;

// The lanes of a generic access by window; their addresses within it.
struct Split {
  u32 shared = 0, local = 0, global = 0;
};
Split split(u32 mask, u64* a) {
  Split s;
  for (int l = 0; l < kLanes; ++l) {
    const u32 bit = mask & 1u << l;
    if (a[l] - kSharedWindow < kWindowBytes) {
      s.shared |= bit;
      a[l] -= kSharedWindow;
    } else if (a[l] - kLocalWindow < kWindowBytes) {
      s.local |= bit;
      a[l] -= kLocalWindow;
    } else {
      s.global |= bit;
    }
  }
  return s;
}

template <Space S>
void read(Warp& w, u32 mask, u64* a, u32 bytes, std::byte* data, u32 flags) {
  if constexpr (S == Space::Global) read_global(w, mask, a, bytes, data, flags);
  if constexpr (S == Space::Const) read_global(w, mask, a, bytes, data, flags | kConstant);
  if constexpr (S == Space::Shared) read_shared(w, mask, a, bytes, data, flags);
  if constexpr (S == Space::Local) read_local(w, mask, a, bytes, data);
  if constexpr (S == Space::Generic) {
    const Split s = split(mask, a);
    if (s.global != 0) read_global(w, s.global, a, bytes, data, flags);
    if (s.shared != 0) read_shared(w, s.shared, a, bytes, data, flags);
    if (s.local != 0) read_local(w, s.local, a, bytes, data);
  }
  if constexpr (S == Space::Param) {
    const auto& parameters = w.launch->parameters;
    for_lanes(mask, [&](int l) {
      if (a[l] > parameters.size() || bytes > parameters.size() - a[l]) {
        throw Fault{Finding::OutOfBounds, l, "reads past the kernel's parameters"};
      }
      std::memcpy(data + static_cast<u32>(l) * bytes, parameters.data() + a[l], bytes);
    });
  }
}

template <Space S>
void write(Warp& w, u32 mask, u64* a, u32 bytes, const std::byte* data, u32 flags) {
  if constexpr (S == Space::Global) write_global(w, mask, a, bytes, data, flags);
  if constexpr (S == Space::Shared) write_shared(w, mask, a, bytes, data, flags);
  if constexpr (S == Space::Local) write_local(w, mask, a, bytes, data);
  if constexpr (S == Space::Generic) {
    const Split s = split(mask, a);
    if (s.global != 0) write_global(w, s.global, a, bytes, data, flags);
    if (s.shared != 0) write_shared(w, s.shared, a, bytes, data, flags);
    if (s.local != 0) write_local(w, s.local, a, bytes, data);
  }
}

// Element k of `count` from the lanes' bytes into a register.
template <class T>
void to_register(const Warp& w, const Ins& i, u32 mask, Place p, const std::byte* data, int k) {
  const T* from = reinterpret_cast<const T*>(data) + k;
  const int step = i.count;
  if ((i.flags & kWideRegister) != 0 || sizeof(T) == 8) {
    each(w.lanes<u64>(p), mask, [=](int l) { return static_cast<u64>(from[l * step]); });
  } else if ((i.flags & kInto16) != 0) {
    each(w.lanes<u32>(p), mask,
         [=](int l) { return static_cast<u32>(static_cast<u16>(from[l * step])); });
  } else {
    each(w.lanes<u32>(p), mask, [=](int l) { return static_cast<u32>(from[l * step]); });
  }
}

template <class T>
void from_register(const Warp& w, const Ins& i, Place p, std::byte* data, int k) {
  T* to = reinterpret_cast<T*>(data) + k;
  const int step = i.count;
  if ((i.flags & kWideRegister) != 0 || sizeof(T) == 8) {
    const u64* from = w.lanes<u64>(p);
    for (int l = 0; l < kLanes; ++l) to[l * step] = static_cast<T>(from[l]);
  } else {
    const u32* from = w.lanes<u32>(p);
    for (int l = 0; l < kLanes; ++l) to[l * step] = static_cast<T>(from[l]);
  }
}

template <Space S>
Step load(Warp& w, const Ins& i, u32 mask) {
  alignas(64) u64 a[kLanes];
  alignas(64) Buffer data;
  addresses(w, i, a);
  read<S>(w, mask, a, static_cast<u32>(i.width) * i.count, data.data(), i.flags & 0xff);
  const bool sign = (i.flags & kSignExtend) != 0;
  for (int k = 0; k < i.count; ++k) {
    const Place p = i.more[k];
    if (p == kNowhere) continue;
    switch (i.width) {
      case 1:
        sign ? to_register<i8>(w, i, mask, p, data.data(), k)
             : to_register<u8>(w, i, mask, p, data.data(), k);
        break;
      case 2:
        sign ? to_register<i16>(w, i, mask, p, data.data(), k)
             : to_register<u16>(w, i, mask, p, data.data(), k);
        break;
      case 4:
        sign ? to_register<i32>(w, i, mask, p, data.data(), k)
             : to_register<u32>(w, i, mask, p, data.data(), k);
        break;
      default:
        to_register<u64>(w, i, mask, p, data.data(), k);
    }
  }
  return Step::Next;
}

template <Space S>
Step store(Warp& w, const Ins& i, u32 mask) {
  alignas(64) u64 a[kLanes];
  alignas(64) Buffer data;
  addresses(w, i, a);
  for (int k = 0; k < i.count; ++k) {
    switch (i.width) {
      case 1:
        from_register<u8>(w, i, i.more[k], data.data(), k);
        break;
      case 2:
        from_register<u16>(w, i, i.more[k], data.data(), k);
        break;
      case 4:
        from_register<u32>(w, i, i.more[k], data.data(), k);
        break;
      default:
        from_register<u64>(w, i, i.more[k], data.data(), k);
    }
  }
  if ((i.flags & kReleases) != 0) fence(w);
  write<S>(w, mask, a, static_cast<u32>(i.width) * i.count, data.data(), i.flags & 0xff);
  return Step::Next;
}

}  // namespace

Handler load_handler(Space space) {
  switch (space) {
    case Space::Generic:
      return &load<Space::Generic>;
    case Space::Global:
      return &load<Space::Global>;
    case Space::Shared:
      return &load<Space::Shared>;
    case Space::Local:
      return &load<Space::Local>;
    case Space::Const:
      return &load<Space::Const>;
    case Space::Param:
      return &load<Space::Param>;
  }
  return nullptr;
}

Handler store_handler(Space space) {
  switch (space) {
    case Space::Generic:
      return &store<Space::Generic>;
    case Space::Global:
      return &store<Space::Global>;
    case Space::Shared:
      return &store<Space::Shared>;
    case Space::Local:
      return &store<Space::Local>;
    default:
      return nullptr;
  }
}

}  // namespace cudasim
