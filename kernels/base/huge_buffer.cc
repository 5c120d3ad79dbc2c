#include "kernels/base/huge_buffer.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <cstring>

#include "kernels/base/error.h"

namespace moesaic {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::size_t rounded_up(std::size_t n) { return (n + kHugePage - 1) / kHugePage * kHugePage; }

}  // namespace

HugeBuffer::HugeBuffer(std::size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  // One page more than needed, so that a multiple of the page size lies within; the rest goes back.
  const std::size_t length = rounded_up(bytes);
  void* mapped =
      mmap(nullptr, length + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  require<IoError>(mapped != MAP_FAILED, "memory: {} bytes for weights refused: {}", length,
                   std::strerror(errno));
  auto* first = static_cast<std::byte*>(mapped);
  const std::size_t skipped =
      rounded_up(reinterpret_cast<std::uintptr_t>(first)) - reinterpret_cast<std::uintptr_t>(first);
  data_ = first + skipped;
  if (skipped > 0) munmap(first, skipped);
  if (skipped < kHugePage) munmap(data_ + length, kHugePage - skipped);
  // Advice: without huge pages the memory is as good, only slower.
  madvise(data_, length, MADV_HUGEPAGE);
}

HugeBuffer::~HugeBuffer() {
  if (data_ != nullptr) munmap(data_, rounded_up(size_));
}

}  // namespace moesaic
