#include "tests/cudasim/exec/memory_ops.h"

namespace cudasim {
namespace {

// The bytes move as late as the program allows: when the copy is waited for. Until then its target
// is marked, and any use of it is a race.

// op[1], op[2]: addresses (shared, global); imm, targets: their offsets.
Step begin(Warp& w, const Ins& i, u32 mask) {
  Copy copy;
  copy.mask = mask;
  copy.bytes = i.width;
  copy.group = 0;
  const auto global_offset = static_cast<u64>(static_cast<i32>((*i.targets)[0]));
  const bool narrow = (i.flags & kAddress32) != 0;
  u64 from[kLanes] = {};
  u32 reading = 0;
  for_lanes(mask, [&](int l) {
    const u64 to =
        (narrow ? w.lanes<u32>(i.op[1])[l] : w.lanes<u64>(i.op[1])[l]) + static_cast<u64>(i.imm);
    copy.to[l] = static_cast<u32>(to);
    from[l] = w.lanes<u64>(i.op[2])[l] + global_offset;
    copy.from[l] = from[l];
    copy.source[l] = copy.bytes;
    if (i.op[3] != kNowhere) copy.source[l] = std::min(copy.bytes, w.lanes<u32>(i.op[3])[l]);
    if (copy.source[l] > 0) reading |= 1u << l;
    copy.group = std::max(copy.group, w.group[l]);
    if (from[l] % copy.bytes != 0) {
      throw Fault{Finding::Misaligned, l,
                  fmt::format("cp.async reads {} bytes at {:#x}, which is not a multiple of {}: {}",
                              copy.bytes, from[l], copy.bytes, w.launch->arena->describe(from[l]))};
    }
    begin_copy(w, l, copy.to[l], copy.bytes);
    // A source of fewer bytes is read byte by byte: only those bytes need to be there.
    if (copy.source[l] == copy.bytes) {
      check_global(w, l, from[l], copy.bytes, false, false, nullptr, kPlain);
    } else {
      for (u32 k = 0; k < copy.source[l]; ++k) {
        check_global(w, l, from[l] + k, 1, false, false, nullptr, kPlain);
      }
    }
  });
  if (reading != 0) count_global(w, reading, from, copy.bytes, false);
  w.tally->async_copies += static_cast<u64>(std::popcount(mask));
  w.copies.push_back(copy);
  return Step::Next;
}

// Moves the bytes of the lanes whose group has been waited for; `keep`: the last groups that may
// stay in flight; everything: those that no commit closed too.
void finish(Warp& w, u32 mask, u32 keep, bool everything) {
  for (Copy& copy : w.copies) {
    for_lanes(copy.mask & mask, [&](int l) {
      if (!everything && copy.group + keep >= w.group[l]) return;
      std::byte* to = w.block->shared.data.data() + (copy.to[l] - kSharedStart);
      std::memset(to, 0, copy.bytes);
      std::memcpy(to, reinterpret_cast<const void*>(copy.from[l]), copy.source[l]);
      finish_copy(w, l, copy.to[l], copy.bytes);
      copy.mask &= ~(1u << l);
    });
  }
  std::erase_if(w.copies, [](const Copy& c) { return c.mask == 0; });
}

Step commit(Warp& w, const Ins&, u32 mask) {
  for_lanes(mask, [&](int l) { ++w.group[l]; });
  return Step::Next;
}

Step wait_group(Warp& w, const Ins& i, u32 mask) {
  finish(w, mask, static_cast<u32>(i.imm), false);
  return Step::Next;
}

Step wait_all(Warp& w, const Ins&, u32 mask) {
  finish(w, mask, 0, true);
  return Step::Next;
}

}  // namespace

Handler async_copy_handler() { return &begin; }
Handler async_commit_handler() { return &commit; }
Handler async_wait_group_handler() { return &wait_group; }
Handler async_wait_all_handler() { return &wait_all; }

}  // namespace cudasim
