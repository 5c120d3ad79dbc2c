#pragma once

#include <vector>

#include "tests/cudasim/base.h"

namespace cudasim {

/// Shared memory of one block with its shadows. Addresses are those of the shared window, from
/// kSharedStart on; index 0 here is that address.
struct SharedMemory {
  std::vector<std::byte> data;
  std::vector<u8> written;     // by byte: 0 or 0xff
  std::vector<u32> writer;     // by 4-byte word (exec/race.h)
  std::vector<u32> reader[2];  // likewise
  u64 size = 0;

  /// Forgets everything for a new block. Contents are a pattern that reads as NaN.
  void reset(u64 bytes) {
    size = bytes;
    const std::size_t padded = (bytes + 15) / 16 * 16 + 512;
    data.assign(padded, std::byte{0xff});
    written.assign(padded, 0);
    writer.assign(padded / 4, 0);
    for (auto& r : reader) r.assign(padded / 4, 0);
  }
};

}  // namespace cudasim
