#include "tests/cudasim/memory/arena.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

namespace cudasim {
namespace {

constexpr u64 kRedzone = 256;
// Reads as a NaN in every float type; filling more than this of one allocation costs too much.
constexpr int kPattern = 0xff;
constexpr u64 kMaxPattern = 1ull << 30;

void* reserve(u64 bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) fail("cannot reserve {} GiB of addresses: {}", bytes >> 30, strerror(errno));
  madvise(p, bytes, MADV_DONTDUMP);
  return p;
}

template <class T>
T* shadow(u64 elements) {
  return static_cast<T*>(reserve(elements * sizeof(T)));
}

template <class T>
void unmap(T* p, u64 elements) {
  munmap(p, elements * sizeof(T));
}

u64 round_up(u64 n, u64 to) { return (n + to - 1) / to * to; }

}  // namespace

Arena::Arena() {
  base_ = reinterpret_cast<u64>(reserve(kBytes + kGranule));
  state_ = shadow<u8>(kBytes);
  words_ = {shadow<u32>(kBytes / 4),
            shadow<u32>(kBytes / 4),
            {shadow<u32>(kBytes / 4), shadow<u32>(kBytes / 4)},
            {shadow<u32>(kBytes / 4), shadow<u32>(kBytes / 4)}};
  granules_ = shadow<u8>(kBytes / kGranule);
  sector_reader_ = shadow<u32>(kBytes / kSector);
  sector_writer_ = shadow<u32>(kBytes / kSector);
  for (u64& c : capacity_) c = kPlaceBytes;
}

Arena::~Arena() {
  unmap(reinterpret_cast<u8*>(base_), kBytes + kGranule);
  unmap(state_, kBytes);
  for (u32* p : {words_.writer_tag, words_.writer, words_.reader_tag[0], words_.reader_tag[1],
                 words_.reader[0], words_.reader[1]}) {
    unmap(p, kBytes / 4);
  }
  unmap(granules_, kBytes / kGranule);
  unmap(sector_reader_, kBytes / kSector);
  unmap(sector_writer_, kBytes / kSector);
}

u64 Arena::allocate(int place, u64 size, u64 align, std::string origin, bool live) {
  const std::lock_guard lock(mutex_);
  const u64 start = round_up(bump_[place] + kRedzone, std::max<u64>(align, 16));
  if (size > kPlaceBytes - kRedzone || start > kPlaceBytes - kRedzone - size ||
      size > capacity_[place] - std::min(capacity_[place], in_use_[place])) {
    return 0;
  }
  bump_[place] = start + size;
  in_use_[place] += size;
  const u64 base = base_ + static_cast<u64>(place) * kPlaceBytes + start;
  allocations_[base] = {base, size, place, next_id_++, std::move(origin), false};
  std::memset(reinterpret_cast<void*>(base), kPattern, std::min(size, kMaxPattern));
  if (live) set_state(base, size, kUninitialised);
  return base;
}

void Arena::activate(u64 base) {
  const Allocation* a = at_base(base);
  if (a != nullptr) set_state(base, a->size, kUninitialised);
}

void Arena::release(u64 base) {
  const std::lock_guard lock(mutex_);
  Allocation& a = allocations_.at(base);
  a.freed = true;
  in_use_[a.place] -= a.size;
  set_state(base, a.size, kFreed);
  // The pages inside go back to the system; the state stays, so that a use is detected.
  const u64 first = round_up(base, kGranule), last = (base + a.size) / kGranule * kGranule;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

const Allocation* Arena::at_base(u64 base) const {
  const std::lock_guard lock(mutex_);
  const auto found = allocations_.find(base);
  return found == allocations_.end() || found->second.freed ? nullptr : &found->second;
}

std::map<u64, Allocation>::const_iterator Arena::nearest(u64 address) const {
  auto after = allocations_.upper_bound(address);
  return after == allocations_.begin() ? allocations_.end() : std::prev(after);
}

const Allocation* Arena::holding(u64 address) const {
  const std::lock_guard lock(mutex_);
  const auto found = nearest(address);
  if (found == allocations_.end() || address - found->first >= found->second.size) return nullptr;
  return &found->second;
}

std::string Arena::describe(u64 address) const {
  const std::lock_guard lock(mutex_);
  if (!contains(address)) return fmt::format("{:#x} is no device memory", address);
  const auto name = [](const Allocation& a) {
    return fmt::format("{}{} #{} ({} bytes)", a.freed ? "freed " : "", a.origin, a.id, a.size);
  };
  const auto before = nearest(address);
  if (before != allocations_.end() && address - before->first < before->second.size) {
    return fmt::format("{:#x} is byte {} of {}", address, address - before->first,
                       name(before->second));
  }
  const auto after = allocations_.upper_bound(address);
  const bool has_before = before != allocations_.end();
  const bool has_after = after != allocations_.end();
  const u64 past = has_before ? address - before->first - before->second.size : ~0ull;
  const u64 ahead = has_after ? after->first - address : ~0ull;
  if (!has_before && !has_after) return fmt::format("{:#x}: nothing is allocated", address);
  if (past <= ahead) {
    return fmt::format("{:#x} is {} bytes past the end of {}", address, past, name(before->second));
  }
  return fmt::format("{:#x} is {} bytes before {}", address, ahead, name(after->second));
}

std::map<u64, Allocation> Arena::live(int place, const std::string& origin) const {
  const std::lock_guard lock(mutex_);
  std::map<u64, Allocation> found;
  for (const auto& [base, a] : allocations_) {
    if (!a.freed && a.place == place && a.origin.starts_with(origin)) found.emplace(base, a);
  }
  return found;
}

void Arena::suballocate(u64 base) {
  const Allocation* a = holding(base);
  if (a == nullptr || a->freed) fail("suballocate: {}", describe(base));
  set_state(a->base, a->size, kUnaddressable);
}

void Arena::region(u64 base, u64 size, bool live) {
  const Allocation* a = holding(base);
  if (a == nullptr || a->freed || size > a->size - (base - a->base)) {
    fail("region of {} bytes: {}", size, describe(base));
  }
  set_state(base, size, live ? kUninitialised : kFreed);
  if (live) std::memset(reinterpret_cast<void*>(base), kPattern, std::min(size, kMaxPattern));
}

void Arena::set_state(u64 address, u64 size, ByteState s) { std::memset(state(address), s, size); }

u64 Arena::first_bad(u64 address, u64 size, bool only_addressable) const {
  const u8* s = state(address);
  for (u64 i = 0; i < size; ++i) {
    const bool ok = only_addressable ? (s[i] & 1) != 0 : s[i] == kInitialised;
    if (!ok) return i;
  }
  return size;
}

}  // namespace cudasim
