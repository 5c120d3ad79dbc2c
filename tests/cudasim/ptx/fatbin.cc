#include "tests/cudasim/ptx/fatbin.h"

#include <zstd.h>

#include <cstring>

namespace cudasim {
namespace {

// fatbinary_section.h; the entries' layout was read off what nvcc 13 writes.
struct Wrapper {
  u32 magic;
  u32 version;
  const std::byte* data;
  const void* file_name;
};
struct Header {
  u32 magic;
  u16 version;
  u16 header_size;
  u64 size;  // of all entries
};
struct Entry {
  u16 kind;  // 1: PTX
  u16 version;
  u32 header_size;
  u64 size;
  u32 compressed_size;
  u32 options;
  u16 minor, major;
  u32 arch;  // 80 for sm_80
  u32 name, name_size;
  u64 flags;
  u64 reserved;
  u64 plain_size;
};
static_assert(sizeof(Entry) == 64);

constexpr u32 kWrapperMagic = 0x466243b1;
constexpr u32 kHeaderMagic = 0xba55ed50;
constexpr u64 kZstd = 0x8000;
constexpr u64 kLz4 = 0x2000;

std::string text_of(const Entry& entry, const std::byte* data) {
  std::string text;
  if (entry.flags & kZstd) {
    text.resize(entry.plain_size);
    const std::size_t n = ZSTD_decompress(text.data(), text.size(), data, entry.compressed_size);
    if (ZSTD_isError(n)) fail("fat binary: {}", ZSTD_getErrorName(n));
    text.resize(n);
  } else if (entry.flags & kLz4) {
    fail("fat binary: PTX is LZ4-compressed; build with nvcc --compress-mode=balance or none");
  } else {
    text.assign(reinterpret_cast<const char*>(data), entry.size);
  }
  if (const auto end = text.find('\0'); end != std::string::npos) text.resize(end);
  return text;
}

}  // namespace

std::string ptx_of_fat_binary(const void* wrapper, int arch) {
  Wrapper w;
  std::memcpy(&w, wrapper, sizeof w);
  if (w.magic != kWrapperMagic) fail("fat binary: wrapper magic {:#x} is unknown", w.magic);
  Header header;
  std::memcpy(&header, w.data, sizeof header);
  if (header.magic != kHeaderMagic) fail("fat binary: magic {:#x} is unknown", header.magic);
  std::string best;
  u32 best_arch = 0;
  const std::byte* at = w.data + header.header_size;
  const std::byte* end = at + header.size;
  while (at < end) {
    Entry entry;
    std::memcpy(&entry, at, sizeof entry);
    const bool fits = entry.arch <= static_cast<u32>(arch) && entry.arch > best_arch;
    if (entry.kind == 1 && fits) {
      best = text_of(entry, at + entry.header_size);
      best_arch = entry.arch;
    }
    at += entry.header_size + entry.size;
  }
  return best;
}

}  // namespace cudasim
