#pragma once

#include "tests/cudasim/exec/block.h"

namespace cudasim {

// Every access goes through these: bounds, life, initialisation, alignment and races are checked,
// and traffic is counted, before a byte moves. `a` holds the lanes' addresses, `data` the lanes'
// bytes one after the other ([32][bytes], bytes 1 to 16). They throw Fault.

enum AccessFlags : u32 {
  kPlain = 0,
  kStrong = 1,    // volatile, relaxed, acquire, release: no race among themselves
  kReadOnly = 2,  // .nc: what the kernel itself writes may not be read so
  kConstant = 4,  // not counted as global traffic
};

void read_global(Warp& w, u32 mask, const u64* a, u32 bytes, std::byte* data, u32 flags);
void write_global(Warp& w, u32 mask, const u64* a, u32 bytes, const std::byte* data, u32 flags);
/// Addresses of the shared window.
void read_shared(Warp& w, u32 mask, const u64* a, u32 bytes, std::byte* data, u32 flags);
void write_shared(Warp& w, u32 mask, const u64* a, u32 bytes, const std::byte* data, u32 flags);
/// Offsets into the thread's local memory.
void read_local(Warp& w, u32 mask, const u64* a, u32 bytes, std::byte* data);
void write_local(Warp& w, u32 mask, const u64* a, u32 bytes, const std::byte* data);

/// One lane's access to global memory, checked but not counted; read-modify-write if `atomic`.
/// `value`: what a plain write is going to write (a write of what is there already is no race).
void check_global(Warp& w, int lane, u64 address, u32 bytes, bool write, bool atomic,
                  const std::byte* value, u32 flags);
/// Likewise for the shared window; returns where the bytes are.
std::byte* check_shared(Warp& w, int lane, u64 address, u32 bytes, bool write, bool atomic,
                        const std::byte* value);
/// Marks the shared bytes as being written by a cp.async of that lane, and when they have arrived.
void begin_copy(Warp& w, int lane, u64 address, u32 bytes);
void finish_copy(Warp& w, int lane, u64 address, u32 bytes);

void count_global(Warp& w, u32 mask, const u64* a, u32 bytes, bool write);
void count_shared(Warp& w, u32 mask, const u64* a, u32 bytes);

/// Which lane's bytes begin in the k-th word of a run of 32 lanes, without a division.
class LaneOfWord {
 public:
  explicit LaneOfWord(u32 bytes)
      : left_(bytes < 4 ? static_cast<u32>(std::countr_zero(4 / bytes)) : 0),
        right_(bytes < 4 ? 0 : static_cast<u32>(std::countr_zero(bytes / 4))) {}
  u32 operator()(u64 k) const { return static_cast<u32>(k) << left_ >> right_; }

 private:
  u32 left_, right_;
};

inline bool contiguous(const u64* a, u32 bytes) {
  u64 differs = 0;
  for (int l = 0; l < kLanes; ++l) differs |= a[l] - a[0] - static_cast<u64>(l) * bytes;
  return differs == 0;
}

/// All lanes of the mask at one address.
inline bool uniform(u32 mask, const u64* a) {
  const u64 first = a[std::countr_zero(mask)];
  u64 differs = 0;
  for (int l = 0; l < kLanes; ++l) differs |= (mask >> l & 1) != 0 ? a[l] ^ first : 0;
  return differs == 0;
}

}  // namespace cudasim
