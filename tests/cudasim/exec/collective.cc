#include "tests/cudasim/exec/collective.h"

#include "tests/cudasim/exec/operators.h"
#include "tests/cudasim/exec/race.h"

namespace cudasim {
namespace {

// Of lanes that named a lane which does not take part, the manual leaves the value open.
constexpr u32 kPoison = 0xffffffffu;

// Calls f(group) for every set of lanes with the same member mask once all lanes that the masks
// name and that have not exited are here; false if some are still to come.
template <class F>
bool with_groups(Warp& w, u32 mask, const u32* members, F f) {
  u32 named = 0;
  for_lanes(mask, [&](int l) {
    if (!has_lane(members[l], l)) {
      throw Fault{
          Finding::WarpMask, l,
          fmt::format("the member mask {:#010x} lacks the lane that executes it", members[l])};
    }
    named |= members[l];
  });
  if ((named & w.live & ~mask) != 0) return false;
  if ((named & w.lost) != 0) {
    throw Fault{Finding::WarpMask, std::countr_zero(mask),
                fmt::format("lanes {:#010x} of the member mask never come: they exit instead",
                            named & w.lost)};
  }
  while (mask != 0) {
    const u32 members_now = members[std::countr_zero(mask)];
    u32 group = 0;
    for_lanes(mask, [&](int l) { group |= members[l] == members_now ? 1u << l : 0; });
    if ((members_now & w.live & ~group) != 0) {
      throw Fault{Finding::WarpMask, std::countr_zero(mask),
                  fmt::format("lanes {:#010x} of the member mask {:#010x} execute it with another "
                              "mask",
                              members_now & w.live & ~group, members_now)};
    }
    f(group);
    mask &= ~group;
  }
  return true;
}

enum class Shuffle { Up, Down, Butterfly, Index };

template <Shuffle M>
Step shuffle(Warp& w, const Ins& i, u32 mask) {
  const u32* a = w.lanes<u32>(i.op[2]);
  const u32* b = w.lanes<u32>(i.op[3]);
  const u32* c = w.lanes<u32>(i.op[4]);
  alignas(64) u32 result[kLanes];
  u32 in_range = 0;
  const bool here = with_groups(w, mask, w.lanes<u32>(i.more[0]), [&](u32 group) {
    for_lanes(group, [&](int l) {
      const int n = static_cast<int>(b[l] & 31);
      const int segment = static_cast<int>(c[l] >> 8 & 31);
      const int top = (l & segment) | (static_cast<int>(c[l] & 31) & ~segment);
      int from = 0;
      bool ok = false;
      switch (M) {
        case Shuffle::Up:
          from = l - n;
          ok = from >= top;
          break;
        case Shuffle::Down:
          from = l + n;
          ok = from <= top;
          break;
        case Shuffle::Butterfly:
          from = l ^ n;
          ok = from <= top;
          break;
        case Shuffle::Index:
          from = (l & segment) | (n & ~segment);
          ok = from <= top;
          break;
      }
      if (!ok) from = l;
      in_range |= ok ? 1u << l : 0;
      result[l] = has_lane(group, from) ? a[from] : kPoison;
    });
  });
  if (!here) return Step::Wait;
  each(w.lanes<u32>(i.op[0]), mask, [&](int l) { return result[l]; });
  if (i.op[1] != kNowhere) w.set_predicate(i.op[1], in_range, mask);
  return Step::Next;
}

enum class Vote { All, Any, Uniform, Ballot };

template <Vote M>
Step vote(Warp& w, const Ins& i, u32 mask) {
  const u32 a = w.predicate(i.op[1]) ^ ((i.flags & 1) != 0 ? kAllLanes : 0);
  u32 bits = 0;
  alignas(64) u32 ballot[kLanes];
  const bool here = with_groups(w, mask, w.lanes<u32>(i.op[2]), [&](u32 group) {
    const u32 yes = a & group;
    bool r = false;
    if (M == Vote::All) r = yes == group;
    if (M == Vote::Any) r = yes != 0;
    if (M == Vote::Uniform) r = yes == 0 || yes == group;
    bits |= r ? group : 0;
    for_lanes(group, [&](int l) { ballot[l] = yes; });
  });
  if (!here) return Step::Wait;
  if (M == Vote::Ballot) {
    each(w.lanes<u32>(i.op[0]), mask, [&](int l) { return ballot[l]; });
  } else {
    w.set_predicate(i.op[0], bits, mask);
  }
  return Step::Next;
}

template <class S, bool All>
Step match(Warp& w, const Ins& i, u32 mask) {
  const S* a = w.lanes<S>(i.op[2]);
  alignas(64) u32 result[kLanes];
  u32 equal = 0;
  const bool here = with_groups(w, mask, w.lanes<u32>(i.op[3]), [&](u32 group) {
    for_lanes(group, [&](int l) {
      u32 same = 0;
      for_lanes(group, [&](int k) { same |= a[k] == a[l] ? 1u << k : 0; });
      if (All) same = same == group ? group : 0;
      equal |= same == group ? 1u << l : 0;
      result[l] = same;
    });
  });
  if (!here) return Step::Wait;
  each(w.lanes<u32>(i.op[0]), mask, [&](int l) { return result[l]; });
  if (i.op[1] != kNowhere) w.set_predicate(i.op[1], equal, mask);
  return Step::Next;
}

struct Sum {
  template <class T>
  static T run(T a, T b) {
    return a + b;
  }
};

template <class Op, class T>
Step reduce(Warp& w, const Ins& i, u32 mask) {
  const u32* a = w.lanes<u32>(i.op[1]);
  alignas(64) u32 result[kLanes];
  const bool here = with_groups(w, mask, w.lanes<u32>(i.op[2]), [&](u32 group) {
    T total = static_cast<T>(a[std::countr_zero(group)]);
    for_lanes(group & (group - 1), [&](int l) { total = Op::run(total, static_cast<T>(a[l])); });
    for_lanes(group, [&](int l) { result[l] = static_cast<u32>(total); });
  });
  if (!here) return Step::Wait;
  each(w.lanes<u32>(i.op[0]), mask, [&](int l) { return result[l]; });
  return Step::Next;
}

Step active_mask(Warp& w, const Ins& i, u32 mask) {
  each(w.lanes<u32>(i.op[0]), mask, [=](int) { return mask; });
  return Step::Next;
}

Step warp_barrier(Warp& w, const Ins& i, u32 mask) {
  if (!with_groups(w, mask, w.lanes<u32>(i.op[0]), [](u32) {})) return Step::Wait;
  sync_warp(w);
  return Step::Next;
}

Step elect(Warp& w, const Ins& i, u32 mask) {
  u32 leaders = 0;
  alignas(64) u32 leader[kLanes];
  const bool here = with_groups(w, mask, w.lanes<u32>(i.op[2]), [&](u32 group) {
    leaders |= group & -group;
    for_lanes(group, [&](int l) { leader[l] = static_cast<u32>(std::countr_zero(group)); });
  });
  if (!here) return Step::Wait;
  if (i.op[0] != kNowhere) each(w.lanes<u32>(i.op[0]), mask, [&](int l) { return leader[l]; });
  if (i.op[1] != kNowhere) w.set_predicate(i.op[1], leaders, mask);
  return Step::Next;
}

}  // namespace

Handler shuffle_handler(std::string_view mode) {
  if (mode == "up") return &shuffle<Shuffle::Up>;
  if (mode == "down") return &shuffle<Shuffle::Down>;
  if (mode == "bfly") return &shuffle<Shuffle::Butterfly>;
  if (mode == "idx") return &shuffle<Shuffle::Index>;
  return nullptr;
}

Handler vote_handler(std::string_view mode) {
  if (mode == "all") return &vote<Vote::All>;
  if (mode == "any") return &vote<Vote::Any>;
  if (mode == "uni") return &vote<Vote::Uniform>;
  if (mode == "ballot") return &vote<Vote::Ballot>;
  return nullptr;
}

Handler match_handler(std::string_view mode, std::string_view type) {
  const bool wide = type == "b64";
  if (!wide && type != "b32") return nullptr;
  if (mode == "any") return wide ? &match<u64, false> : &match<u32, false>;
  if (mode == "all") return wide ? &match<u64, true> : &match<u32, true>;
  return nullptr;
}

Handler reduce_handler(std::string_view op, std::string_view type) {
  const bool is_signed = type == "s32";
  if (op == "add") return &reduce<Sum, u32>;
  if (op == "min") return is_signed ? &reduce<Least, i32> : &reduce<Least, u32>;
  if (op == "max") return is_signed ? &reduce<Greatest, i32> : &reduce<Greatest, u32>;
  if (op == "and") return &reduce<And, u32>;
  if (op == "or") return &reduce<Or, u32>;
  if (op == "xor") return &reduce<Xor, u32>;
  return nullptr;
}

Handler active_mask_handler() { return &active_mask; }
Handler warp_barrier_handler() { return &warp_barrier; }
Handler elect_handler() { return &elect; }

}  // namespace cudasim
