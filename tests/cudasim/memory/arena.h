#pragma once

#include <map>
#include <mutex>
#include <string>

#include "tests/cudasim/base.h"

namespace cudasim {

/// What the stand-in knows of a byte of device memory.
enum ByteState : u8 {
  kUnaddressable = 0x00,  // never allocated, or a redzone
  kUninitialised = 0x01,  // allocated, not written
  kFreed = 0x02,
  kInitialised = 0xff,
};

struct Allocation {
  u64 base = 0;
  u64 size = 0;
  int place = 0;
  u64 id = 0;          // in the order of allocation, from 1
  std::string origin;  // "cudaMalloc", "__device__ counter", …
  bool freed = false;
};

/// All memory that a kernel can reach by a global address: a reserved range of host addresses, a
/// part of it for each device and one for pinned host memory, with the checkers' shadows beside it.
/// A device pointer is a host pointer, so host code of the stand-in reads device memory directly.
/// Addresses are not used again: a stale pointer stays detectable for the life of the process.
class Arena {
 public:
  static constexpr u64 kPlaceBytes = 128ull << 30;
  static constexpr int kPlaces = 8;
  static constexpr int kHost = kPlaces - 1;  // the other places are devices
  static constexpr u64 kBytes = kPlaceBytes * kPlaces;
  static constexpr u64 kSector = 32;  // bytes; the unit of DRAM and L2 traffic
  static constexpr u64 kGranule = 4096;

  Arena();
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  /// 0 if `place` has less than `size` left. Contents are a pattern that reads as NaN.
  /// `live`: addressable at once; otherwise from activate() on.
  u64 allocate(int place, u64 size, u64 align, std::string origin, bool live = true);
  void activate(u64 base);
  /// From now on an access is a use after free.
  void release(u64 base);
  /// Live allocation that starts at `base`, or null.
  const Allocation* at_base(u64 base) const;
  /// Allocation (live or freed) that holds `address`, or null.
  const Allocation* holding(u64 address) const;
  /// "0x… is 4 bytes past the end of cudaMalloc #3 (4096 bytes)".
  std::string describe(u64 address) const;
  u64 bytes_in_use(int place) const { return in_use_[place]; }
  void set_capacity(int place, u64 bytes) { capacity_[place] = bytes; }
  /// Live allocations of a place whose origin starts with `origin`.
  std::map<u64, Allocation> live(int place, const std::string& origin) const;

  /// Turns the allocation that holds `base` into an arena of the program's own: nothing of it is
  /// addressable until region() says so.
  void suballocate(u64 base);
  /// [base, base + size) of a suballocated allocation becomes addressable and uninitialised
  /// (`live`), or a freed region.
  void region(u64 base, u64 size, bool live);

  bool contains(u64 address, u64 size = 1) const {
    return address - base_ < kBytes && size <= kBytes - (address - base_);
  }
  u64 base() const { return base_; }
  int place_of(u64 address) const { return static_cast<int>((address - base_) / kPlaceBytes); }

  u8* state(u64 address) const { return state_ + (address - base_); }
  void set_state(u64 address, u64 size, ByteState s);
  /// First byte of the range that is not initialised (or, with `only_addressable`, not
  /// addressable); `size` if there is none.
  u64 first_bad(u64 address, u64 size, bool only_addressable) const;

  // Race shadows, one element per 4-byte word (exec/race.h says what they hold).
  struct Words {
    u32* writer_tag;
    u32* writer;
    u32* reader_tag[2];
    u32* reader[2];
  };
  const Words& words() const { return words_; }
  u64 word_index(u64 address) const { return (address - base_) / 4; }
  /// True where a kernel has ever written to the granule: only there reads are recorded.
  u8* written_granule(u64 address) const { return granules_ + (address - base_) / kGranule; }
  /// Launch that last read or wrote a sector, for counting unique bytes.
  u32* sector_reader(u64 address) const { return sector_reader_ + (address - base_) / kSector; }
  u32* sector_writer(u64 address) const { return sector_writer_ + (address - base_) / kSector; }

 private:
  std::map<u64, Allocation>::const_iterator nearest(u64 address) const;

  u64 base_ = 0;
  u8* state_ = nullptr;
  Words words_{};
  u8* granules_ = nullptr;
  u32* sector_reader_ = nullptr;
  u32* sector_writer_ = nullptr;
  mutable std::mutex mutex_;
  std::map<u64, Allocation> allocations_;  // by base, the freed ones too
  u64 next_id_ = 1;
  u64 bump_[kPlaces] = {};
  u64 in_use_[kPlaces] = {};
  u64 capacity_[kPlaces];
};

}  // namespace cudasim
