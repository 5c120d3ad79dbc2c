#include <algorithm>

#include "tests/cudasim/exec/memory_access.h"
#include "tests/cudasim/exec/race.h"

namespace cudasim {
namespace {

inline void note_reader(SharedMemory& m, u64 k, u32 entry) {
  const u32 last = m.reader[0][k];
  const bool same = last >> 27 == entry >> 27;
  m.reader[1][k] = same ? m.reader[1][k] : last;
  m.reader[0][k] = entry;
}

bool inside(const SharedMemory& m, u64 address, u64 bytes) {
  return address >= kSharedStart && address - kSharedStart <= m.size &&
         bytes <= m.size - (address - kSharedStart);
}

// True where one of the words has an access that is not known to be ordered before everything now.
bool recent(const std::vector<u32>& entries, u64 word, u64 count, u32 base) {
  u32 newest = 0;
  for (u64 k = 0; k < count; ++k) newest = std::max(newest, clock_of(entries[word + k]));
  return newest > base;
}

void count_run(Warp& w, u32 bytes) {
  const u64 waves = std::max<u64>(1, bytes / 4);
  ++w.tally->shared_requests;
  w.tally->shared_wavefronts += waves;
  w.tally->shared_ideal_wavefronts += waves;
}

bool read_run(Warp& w, u64 first, u32 bytes, std::byte* data) {
  SharedMemory& m = w.block->shared;
  const u64 n = static_cast<u64>(kLanes) * bytes;
  if (first % bytes != 0 || first % 4 != 0 || !inside(m, first, n)) return false;
  const u64 at = first - kSharedStart, word = at / 4, count = n / 4;
  u8 all = 0xff;
  for (u64 k = 0; k < n; ++k) all &= m.written[at + k];
  if (all != 0xff || recent(m.writer, word, count, w.block->base_clock)) return false;
  const u32 thread = w.thread(0), bits = bytes >= 4 ? 15 : (1u << bytes) - 1;
  const LaneOfWord lane_of(bytes);
  u32* r0 = m.reader[0].data() + word;
  u32* r1 = m.reader[1].data() + word;
#pragma GCC ivdep
  for (u64 k = 0; k < count; ++k) {
    const u32 entry = entry_of(thread + lane_of(k), bits, false, w.clock);
    const u32 last = r0[k];
    r1[k] = last >> 27 == entry >> 27 ? r1[k] : last;
    r0[k] = entry;
  }
  std::memcpy(data, m.data.data() + at, n);
  count_run(w, bytes);
  return true;
}

bool write_run(Warp& w, u64 first, u32 bytes, const std::byte* data) {
  SharedMemory& m = w.block->shared;
  const u64 n = static_cast<u64>(kLanes) * bytes;
  if (bytes < 4 || first % bytes != 0 || !inside(m, first, n)) return false;
  const u64 at = first - kSharedStart, word = at / 4, count = n / 4;
  const u32 base = w.block->base_clock;
  if (recent(m.writer, word, count, base) || recent(m.reader[0], word, count, base) ||
      recent(m.reader[1], word, count, base)) {
    return false;
  }
  for (u64 k = 0; k < n; ++k) {
    if (m.written[at + k] == 2) return false;
  }
  const u32 thread = w.thread(0);
  const LaneOfWord lane_of(bytes);
  u32* writer = m.writer.data() + word;
  for (u64 k = 0; k < count; ++k) {
    writer[k] = entry_of(thread + lane_of(k), 15, false, w.clock);
  }
  std::memset(m.written.data() + at, 0xff, n);
  std::memcpy(m.data.data() + at, data, n);
  count_run(w, bytes);
  return true;
}

}  // namespace

std::byte* check_shared(Warp& w, int lane, u64 address, u32 bytes, bool write, bool atomic,
                        const std::byte* value) {
  SharedMemory& m = w.block->shared;
  const char* what = write ? "writes" : "reads";
  if (address % bytes != 0) {
    throw Fault{Finding::Misaligned, lane,
                fmt::format("{} {} bytes at shared address {:#x}, which is not a multiple of {}",
                            what, bytes, address, bytes)};
  }
  if (!inside(m, address, bytes)) {
    throw Fault{Finding::OutOfBounds, lane,
                fmt::format("{} {} bytes at shared address {:#x}; the block's shared memory is "
                            "[{:#x}, {:#x})",
                            what, bytes, address, kSharedStart, kSharedStart + m.size)};
  }
  const u64 at = address - kSharedStart;
  u8 all = 0xff;
  for (u32 k = 0; k < bytes; ++k) {
    if (m.written[at + k] == 2) {
      throw Fault{Finding::OutOfBounds, lane,
                  fmt::format("{} {} bytes at shared address {:#x}, between two variables", what,
                              bytes, address)};
    }
    all &= m.written[at + k];
  }
  const Access now{&w, lane, address, bytes, write, atomic, true};
  const u32 thread = w.thread(lane);
  for (u64 word = address & ~3ull; word < address + bytes; word += 4) {
    const u64 k = (word - kSharedStart) / 4;
    const u32 mine = byte_mask(address, bytes, word);
    const auto conflicts = [&](u32 entry) {
      return (bytes_of(entry) & mine) != 0 && !(atomic && (entry & kAtomicBit) != 0) &&
             !ordered(w, thread, 0, entry);
    };
    if (conflicts(m.writer[k])) {
      const bool same = write && value != nullptr && clock_of(m.writer[k]) != kInFlight &&
                        std::memcmp(value, m.data.data() + at, bytes) == 0;
      if (!same) report_race(now, 0, m.writer[k], true, word);
    }
    const u32 entry = entry_of(thread, mine, atomic, w.clock);
    if (write) {
      for (const auto& reader : m.reader) {
        if (conflicts(reader[k])) report_race(now, 0, reader[k], false, word);
      }
      m.writer[k] = entry;
    } else {
      note_reader(m, k, entry);
    }
  }
  if ((!write || atomic) && all != 0xff) {
    throw Fault{Finding::Uninitialised, lane,
                fmt::format("reads {} bytes at shared address {:#x} that nothing has written",
                            bytes, address)};
  }
  if (write) std::memset(m.written.data() + at, 0xff, bytes);
  return m.data.data() + at;
}

void begin_copy(Warp& w, int lane, u64 address, u32 bytes) {
  check_shared(w, lane, address, bytes, true, false, nullptr);
  SharedMemory& m = w.block->shared;
  for (u64 word = address; word < address + bytes; word += 4) {
    m.writer[(word - kSharedStart) / 4] =
        entry_of(w.thread(lane), byte_mask(address, bytes, word), false, kInFlight);
  }
}

void finish_copy(Warp& w, int lane, u64 address, u32 bytes) {
  SharedMemory& m = w.block->shared;
  for (u64 word = address; word < address + bytes; word += 4) {
    m.writer[(word - kSharedStart) / 4] =
        entry_of(w.thread(lane), byte_mask(address, bytes, word), false, w.clock);
  }
}

void read_shared(Warp& w, u32 mask, const u64* a, u32 bytes, std::byte* data, u32 flags) {
  if (mask == kAllLanes && contiguous(a, bytes) && read_run(w, a[0], bytes, data)) return;
  if (uniform(mask, a)) {
    const int lane = std::countr_zero(mask);
    const std::byte* from =
        check_shared(w, lane, a[lane], bytes, false, (flags & kStrong) != 0, nullptr);
    for_lanes(mask, [&](int l) { std::memcpy(data + static_cast<u32>(l) * bytes, from, bytes); });
  } else {
    for_lanes(mask, [&](int l) {
      const std::byte* from =
          check_shared(w, l, a[l], bytes, false, (flags & kStrong) != 0, nullptr);
      std::memcpy(data + static_cast<u32>(l) * bytes, from, bytes);
    });
  }
  count_shared(w, mask, a, bytes);
}

void write_shared(Warp& w, u32 mask, const u64* a, u32 bytes, const std::byte* data, u32 flags) {
  const bool strong = (flags & kStrong) != 0;
  if (!strong && mask == kAllLanes && contiguous(a, bytes) && write_run(w, a[0], bytes, data)) {
    return;
  }
  for_lanes(mask, [&](int l) {
    const std::byte* value = data + static_cast<u32>(l) * bytes;
    std::memcpy(check_shared(w, l, a[l], bytes, true, strong, value), value, bytes);
  });
  count_shared(w, mask, a, bytes);
}

// Accesses of 8 bytes go in two halves of the warp, of 16 bytes in four quarters; each takes as
// many passes as the fullest of the 32 banks has different words.
void count_shared(Warp& w, u32 mask, const u64* a, u32 bytes) {
  ++w.tally->shared_requests;
  if (uniform(mask, a)) {
    ++w.tally->shared_wavefronts;
    ++w.tally->shared_ideal_wavefronts;
    return;
  }
  const int lanes = bytes <= 4 ? kLanes : bytes == 8 ? 16 : 8;
  const u32 words = std::max(1u, bytes / 4);
  for (int first = 0; first < kLanes; first += lanes) {
    std::array<u64, kLanes> word;
    std::size_t n = 0;
    for (int l = first; l < first + lanes; ++l) {
      for (u32 k = 0; has_lane(mask, l) && k < words; ++k) word[n++] = a[l] / 4 + k;
    }
    if (n == 0) continue;
    const auto end = word.begin() + static_cast<std::ptrdiff_t>(n);
    if (!std::is_sorted(word.begin(), end)) std::sort(word.begin(), end);
    std::array<u8, 32> in_bank{};
    u8 most = 1;
    for (std::size_t k = 0; k < n; ++k) {
      if (k > 0 && word[k] == word[k - 1]) continue;
      most = std::max(most, ++in_bank[word[k] % 32]);
    }
    w.tally->shared_wavefronts += most;
    ++w.tally->shared_ideal_wavefronts;
  }
}

void read_local(Warp& w, u32 mask, const u64* a, u32 bytes, std::byte* data) {
  const u64 frame = w.launch->program->local_bytes;
  for_lanes(mask, [&](int l) {
    if (a[l] > frame || bytes > frame - a[l] || a[l] % bytes != 0) {
      throw Fault{Finding::OutOfBounds, l,
                  fmt::format("reads {} bytes at offset {} of {} bytes of local memory", bytes,
                              a[l], frame)};
    }
    std::memcpy(data + static_cast<u32>(l) * bytes,
                w.block->local.data() + w.thread(l) * frame + a[l], bytes);
    w.tally->local_bytes += bytes;
  });
}

void write_local(Warp& w, u32 mask, const u64* a, u32 bytes, const std::byte* data) {
  const u64 frame = w.launch->program->local_bytes;
  for_lanes(mask, [&](int l) {
    if (a[l] > frame || bytes > frame - a[l] || a[l] % bytes != 0) {
      throw Fault{Finding::OutOfBounds, l,
                  fmt::format("writes {} bytes at offset {} of {} bytes of local memory", bytes,
                              a[l], frame)};
    }
    std::memcpy(w.block->local.data() + w.thread(l) * frame + a[l],
                data + static_cast<u32>(l) * bytes, bytes);
    w.tally->local_bytes += bytes;
  });
}

}  // namespace cudasim
