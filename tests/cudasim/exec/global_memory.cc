#include <algorithm>
#include <atomic>

#include "tests/cudasim/exec/memory_access.h"
#include "tests/cudasim/exec/race.h"

namespace cudasim {
namespace {

bool registered(const Launch& launch, u64 address, u32 bytes) {
  for (const auto& r : launch.registered) {
    if (address >= r.base && bytes <= r.size && address - r.base <= r.size - bytes) return true;
  }
  return false;
}

[[noreturn]] void bad_address(Warp& w, int lane, u64 address, u32 bytes, bool write) {
  const Arena& arena = *w.launch->arena;
  const char* what = write ? "writes" : "reads";
  if (!arena.contains(address, bytes)) {
    throw Fault{
        Finding::OutOfBounds, lane,
        fmt::format("{} {} bytes at {:#x}, which is no device memory", what, bytes, address)};
  }
  if ((w.launch->places >> arena.place_of(address) & 1) == 0) {
    throw Fault{
        Finding::OutOfBounds, lane,
        fmt::format("{} {} bytes of device {} from device {} without peer access: {}", what, bytes,
                    arena.place_of(address), w.launch->device, arena.describe(address))};
  }
  const u64 bad = address + arena.first_bad(address, bytes, true);
  const bool freed = *arena.state(std::min(bad, address + bytes - 1)) == kFreed;
  throw Fault{freed ? Finding::UseAfterFree : Finding::OutOfBounds, lane,
              fmt::format("{} {} bytes at {:#x}: {}", what, bytes, address, arena.describe(bad))};
}

void touch_sectors(Warp& w, u64 first, u64 bytes, bool write) {
  const Arena& arena = *w.launch->arena;
  u32* stamp = write ? arena.sector_writer(first) : arena.sector_reader(first);
  const u64 n = (first % Arena::kSector + bytes + Arena::kSector - 1) / Arena::kSector;
  const u32 id = w.launch->id;
  u64 fresh = 0;
  for (u64 k = 0; k < n; ++k) {
    std::atomic_ref<u32> s(stamp[k]);
    if (s.load(std::memory_order_relaxed) != id &&
        s.exchange(id, std::memory_order_relaxed) != id) {
      ++fresh;
    }
  }
  (write ? w.tally->unique_written_bytes : w.tally->unique_read_bytes) += fresh * Arena::kSector;
}

void count_contiguous(Warp& w, u64 first, u32 bytes, bool write) {
  const u64 n = static_cast<u64>(kLanes) * bytes;
  Tally::Traffic& t = write ? w.tally->stores : w.tally->loads;
  ++t.requests;
  t.bytes += n;
  t.ideal_sectors += (n + Arena::kSector - 1) / Arena::kSector;
  t.sectors += (first % Arena::kSector + n + Arena::kSector - 1) / Arena::kSector;
  touch_sectors(w, first, n, write);
}

// The last two readers of a word, the second of another warp than the first.
inline void note_reader(const Arena::Words& words, u64 k, u32 tag, u32 entry) {
  const bool same = words.reader_tag[0][k] == tag && words.reader[0][k] >> 27 == entry >> 27;
  words.reader_tag[1][k] = same ? words.reader_tag[1][k] : words.reader_tag[0][k];
  words.reader[1][k] = same ? words.reader[1][k] : words.reader[0][k];
  words.reader_tag[0][k] = tag;
  words.reader[0][k] = entry;
}

// Which earlier accesses to the words of a run are of no concern: those of other launches, and
// those of the lane that has the word now.
class Own {
 public:
  Own(const Warp& w, u32 bytes)
      : first_tag_(w.launch->first_tag),
        tag_(w.block->tag),
        thread_(w.thread(0)),
        lane_(bytes),
        shared_words_(bytes < 4) {}

  u32 foreign(u64 k, u32 tag, u32 entry) const {
    const u32 thread = thread_ + lane_(k);
    const u32 mine = static_cast<u32>(tag == tag_) & static_cast<u32>(entry >> 22 == thread) &
                     static_cast<u32>(!shared_words_);
    return static_cast<u32>(tag >= first_tag_) & (mine ^ 1u);
  }
  bool any(const u32* tags, u64 count) const {
    u32 newest = 0;
    for (u64 k = 0; k < count; ++k) newest = std::max(newest, tags[k]);
    return newest >= first_tag_;
  }

 private:
  u32 first_tag_, tag_, thread_;
  LaneOfWord lane_;
  bool shared_words_;  // several lanes to a word
};

// 32 lanes, one after the other in memory. False: something needs a closer look, lane by lane.
bool read_run(Warp& w, u64 first, u32 bytes, std::byte* data, u32 flags) {
  const Arena& arena = *w.launch->arena;
  const u64 n = static_cast<u64>(kLanes) * bytes;
  if (first % bytes != 0 || !arena.contains(first, n) ||
      (w.launch->places >> arena.place_of(first) & 1) == 0) {
    return false;
  }
  const u8* state = arena.state(first);
  u8 all = 0xff;
  for (u64 k = 0; k < n; ++k) all &= state[k];
  if (all != kInitialised || first % 4 != 0) return false;
  const auto& words = arena.words();
  const u64 word = arena.word_index(first), count = n / 4;
  const Own own(w, bytes);
  u32 foreign = 0;
  for (u64 k = 0; k < count; ++k) {
    foreign |= own.foreign(k, words.writer_tag[word + k], words.writer[word + k]);
  }
  if (foreign != 0 || ((flags & kReadOnly) != 0 && own.any(words.writer_tag + word, count))) {
    return false;
  }
  if ((*arena.written_granule(first) | *arena.written_granule(first + n - 1)) != 0 &&
      (flags & kStrong) == 0) {
    const u32 tag = w.block->tag, thread = w.thread(0);
    const LaneOfWord lane_of(bytes);
    for (u64 k = 0; k < count; ++k) {
      const u32 lane = lane_of(k);
      note_reader(words, word + k, tag,
                  entry_of(thread + lane, bytes >= 4 ? 15 : (1u << bytes) - 1, false, w.clock));
    }
  }
  std::memcpy(data, reinterpret_cast<const void*>(first), n);
  if ((flags & kConstant) == 0) count_contiguous(w, first, bytes, false);
  return true;
}

bool write_run(Warp& w, u64 first, u32 bytes, const std::byte* data, u32 flags) {
  const Arena& arena = *w.launch->arena;
  const u64 n = static_cast<u64>(kLanes) * bytes;
  if (first % bytes != 0 || !arena.contains(first, n) || (flags & kStrong) != 0 || bytes < 4 ||
      (w.launch->places >> arena.place_of(first) & 1) == 0) {
    return false;
  }
  u8* state = arena.state(first);
  u8 all = 1;
  for (u64 k = 0; k < n; ++k) all &= state[k];
  if (all == 0) return false;
  const auto& words = arena.words();
  const u64 word = arena.word_index(first), count = n / 4;
  const Own own(w, bytes);
  u32 foreign = 0;
  for (u64 k = 0; k < count; ++k) {
    foreign |= own.foreign(k, words.writer_tag[word + k], words.writer[word + k]);
    foreign |= own.foreign(k, words.reader_tag[0][word + k], words.reader[0][word + k]);
    foreign |= own.foreign(k, words.reader_tag[1][word + k], words.reader[1][word + k]);
  }
  if (foreign != 0) return false;
  const u32 tag = w.block->tag, thread = w.thread(0);
  const LaneOfWord lane_of(bytes);
  for (u64 k = 0; k < count; ++k) {
    words.writer_tag[word + k] = tag;
    words.writer[word + k] = entry_of(thread + lane_of(k), 15, false, w.clock);
  }
  *arena.written_granule(first) = *arena.written_granule(first + n - 1) = 1;
  std::memset(state, kInitialised, n);
  std::memcpy(reinterpret_cast<void*>(first), data, n);
  count_contiguous(w, first, bytes, true);
  return true;
}

void check_race(const Access& now, const std::byte* value, u32 flags) {
  const Warp& w = *now.warp;
  const Arena& arena = *w.launch->arena;
  const auto& words = arena.words();
  const u32 tag = w.block->tag, thread = w.thread(now.lane), first_tag = w.launch->first_tag;
  if (now.write) {
    *arena.written_granule(now.address) = *arena.written_granule(now.address + now.bytes - 1) = 1;
  }
  const bool tracked = *arena.written_granule(now.address) != 0;
  for (u64 at = now.address & ~3ull; at < now.address + now.bytes; at += 4) {
    const u64 k = arena.word_index(at);
    const u32 mine = byte_mask(now.address, now.bytes, at);
    const auto conflicts = [&](u32 other_tag, u32 entry) {
      return other_tag >= first_tag && (bytes_of(entry) & mine) != 0 &&
             !(now.atomic && (entry & kAtomicBit) != 0) && !ordered(w, thread, other_tag, entry);
    };
    // Another block's atomic may change both at this moment, on another host thread: whose tag it
    // is here, that one's entry is there already.
    const u32 writer_tag = std::atomic_ref(words.writer_tag[k]).load(std::memory_order_acquire);
    const u32 writer = std::atomic_ref(words.writer[k]).load(std::memory_order_relaxed);
    if (writer_tag >= first_tag && (flags & kReadOnly) != 0 && (bytes_of(writer) & mine) != 0) {
      throw Fault{Finding::ReadOnlyWritten, now.lane,
                  fmt::format("ld.global.nc reads what this launch has written: {}",
                              arena.describe(now.address))};
    }
    if (conflicts(writer_tag, writer)) {
      const bool same_value =
          value != nullptr &&
          std::memcmp(value, reinterpret_cast<const void*>(now.address), now.bytes) == 0;
      if (!now.write || !same_value) report_race(now, writer_tag, writer, true, at);
    }
    const u32 entry = entry_of(thread, mine, now.atomic, w.clock);
    if (now.write) {
      for (int r = 0; r < 2; ++r) {
        if (conflicts(words.reader_tag[r][k], words.reader[r][k])) {
          report_race(now, words.reader_tag[r][k], words.reader[r][k], false, at);
        }
      }
      std::atomic_ref(words.writer[k]).store(entry, std::memory_order_relaxed);
      std::atomic_ref(words.writer_tag[k]).store(tag, std::memory_order_release);
    } else if (tracked) {
      note_reader(words, k, tag, entry);
    }
  }
}

}  // namespace

void check_global(Warp& w, int lane, u64 address, u32 bytes, bool write, bool atomic,
                  const std::byte* value, u32 flags) {
  const Arena& arena = *w.launch->arena;
  if (address % bytes != 0) {
    throw Fault{
        Finding::Misaligned, lane,
        fmt::format("{} {} bytes at {:#x}, which is not a multiple of {}: {}",
                    write ? "writes" : "reads", bytes, address, bytes, arena.describe(address))};
  }
  if (!arena.contains(address, bytes) || (w.launch->places >> arena.place_of(address) & 1) == 0) {
    if (registered(*w.launch, address, bytes)) return;
    bad_address(w, lane, address, bytes, write);
  }
  u8* state = arena.state(address);
  u8 addressable = 1, initialised = 0xff;
  for (u32 k = 0; k < bytes; ++k) {
    addressable &= state[k];
    initialised &= state[k];
  }
  if (addressable == 0) bad_address(w, lane, address, bytes, write);
  if ((!write || atomic) && initialised != kInitialised) {
    throw Fault{Finding::Uninitialised, lane,
                fmt::format("reads {} bytes that nothing has written: {}", bytes,
                            arena.describe(address + arena.first_bad(address, bytes, false)))};
  }
  check_race({&w, lane, address, bytes, write, atomic || (flags & kStrong) != 0, false}, value,
             flags);
  if (write) std::memset(state, kInitialised, bytes);
}

namespace {

void load(Warp& w, u32 mask, const u64* a, u32 bytes, std::byte* data, u32 flags) {
  if (mask == kAllLanes && contiguous(a, bytes) && read_run(w, a[0], bytes, data, flags)) return;
  if (uniform(mask, a)) {
    const int lane = std::countr_zero(mask);
    check_global(w, lane, a[lane], bytes, false, false, nullptr, flags);
    for_lanes(mask, [&](int l) {
      std::memcpy(data + static_cast<u32>(l) * bytes, reinterpret_cast<const void*>(a[l]), bytes);
    });
  } else {
    for_lanes(mask, [&](int l) {
      check_global(w, l, a[l], bytes, false, false, nullptr, flags);
      std::memcpy(data + static_cast<u32>(l) * bytes, reinterpret_cast<const void*>(a[l]), bytes);
    });
  }
  if ((flags & kConstant) == 0) count_global(w, mask, a, bytes, false);
}

}  // namespace

void read_global(Warp& w, u32 mask, const u64* a, u32 bytes, std::byte* data, u32 flags) {
  load(w, mask, a, bytes, data, flags);
  // Not before: another block may release between the two, on another host thread, what is read.
  if ((flags & kStrong) != 0) acquire(w);
}

void write_global(Warp& w, u32 mask, const u64* a, u32 bytes, const std::byte* data, u32 flags) {
  if ((flags & kStrong) != 0) release(w);
  if (mask == kAllLanes && contiguous(a, bytes) && write_run(w, a[0], bytes, data, flags)) return;
  for_lanes(mask, [&](int l) {
    const std::byte* value = data + static_cast<u32>(l) * bytes;
    check_global(w, l, a[l], bytes, true, false, value, flags);
    std::memcpy(reinterpret_cast<void*>(a[l]), value, bytes);
  });
  count_global(w, mask, a, bytes, true);
}

void count_global(Warp& w, u32 mask, const u64* a, u32 bytes, bool write) {
  std::array<u64, kLanes> sorted;
  std::size_t n = 0;
  for_lanes(mask, [&](int l) { sorted[n++] = a[l]; });
  if (!std::is_sorted(sorted.begin(), sorted.begin() + static_cast<std::ptrdiff_t>(n))) {
    std::sort(sorted.begin(), sorted.begin() + static_cast<std::ptrdiff_t>(n));
  }
  u64 distinct = 0, sectors = 0, last_sector = ~0ull;
  for (std::size_t k = 0; k < n; ++k) {
    if (k > 0 && sorted[k] == sorted[k - 1]) continue;
    ++distinct;
    // An aligned access of at most 16 bytes lies in one sector.
    const u64 sector = sorted[k] / Arena::kSector;
    if (sector == last_sector) continue;
    last_sector = sector;
    ++sectors;
    if (w.launch->arena->contains(sorted[k], bytes)) touch_sectors(w, sorted[k], bytes, write);
  }
  Tally::Traffic& t = write ? w.tally->stores : w.tally->loads;
  ++t.requests;
  t.bytes += n * bytes;
  t.sectors += sectors;
  t.ideal_sectors += (distinct * bytes + Arena::kSector - 1) / Arena::kSector;
}

}  // namespace cudasim
