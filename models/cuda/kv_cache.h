#pragma once

#include <cstdint>
#include <vector>

#include "engine/decoder.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/base/arena.h"
#include "kernels/cuda/base/device_buffer.h"
#include "kernels/cuda/base/pinned_buffer.h"
#include "kernels/cuda/base/stream.h"

namespace moesaic::models {

/// A KV cache in device memory, in pages of cuda::kKvPage positions: a sequence holds pages for the
/// positions that it has reached, and not for all it might reach. A page holds the keys and values
/// of all layers, [n_layers, 2, kKvPage, n_kv_heads, head_dim]. Pages are allocated some at a time
/// when none is free, and kept until the cache ends.
class CudaKvCache final : public engine::KvCache {
 public:
  /// On the current device. Throws InputError as KvCache, DeviceError.
  CudaKvCache(const engine::DecoderShape& shape, std::int64_t n_slots, std::int64_t capacity);

  /// Gives each position up to those of the batch its page; a slot of which the batch has position
  /// 0 begins anew and gives back what it held. Queues a copy of the table where it changed. No
  /// earlier work of `stream` may still be under way. Throws DeviceError, saying how many positions
  /// the cache holds, if there is no memory for a page; the cache is then as before, but for
  /// sequences that began anew.
  void reach(const engine::Batch& batch, const cuda::Stream& stream);

  cuda::PagedKv layer(int layer) const;
  std::int64_t bytes() const;  // of all pages allocated so far

 private:
  float** entry(std::int64_t slot, std::int64_t page) const;
  void release(std::int64_t slot);
  void allocate();
  std::int64_t page_bytes() const;

  std::int64_t row_, pages_per_slot_;
  std::vector<std::int64_t> held_;  // [n_slots] pages of each
  std::vector<float*> free_;
  std::vector<cuda::Arena> chunks_;
  cuda::PinnedBuffer<float*> host_table_;  // [n_slots, pages_per_slot]
  cuda::DeviceBuffer<float*> table_;
};

}  // namespace moesaic::models
