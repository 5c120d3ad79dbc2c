#pragma once

#include <cstdint>
#include <memory>

#include "kernels/attention.h"

namespace moesaic::engine {

/// Provides at least `bytes` at a multiple of 64, where a decoder wants its cache. Throws
/// InputError or DeviceError.
using KvAllocator = std::shared_ptr<float> (*)(std::int64_t bytes);

/// The host's memory, zero, of which the system provides what has been written (pages come on first
/// touch).
std::shared_ptr<float> allocate_host_kv(std::int64_t bytes);

/// Keys and values of every layer for n_slots sequences of up to `capacity` positions, float32.
/// Size: 2 · n_layers · n_slots · capacity · n_kv_heads · head_dim · 4 bytes.
class KvCache {
 public:
  /// Throws InputError for a size that is not positive or not available.
  KvCache(int n_layers, std::int64_t n_slots, std::int64_t capacity, int n_kv_heads, int head_dim,
          KvAllocator allocate = allocate_host_kv);

  kernels::KvLayerView layer(int layer);
  KvAllocator allocator() const { return allocator_; }  // what its memory comes from
  int n_layers() const { return n_layers_; }
  std::int64_t n_slots() const { return n_slots_; }
  std::int64_t capacity() const { return capacity_; }
  std::int64_t bytes() const {
    return 2 * n_layers_ * per_layer_ * static_cast<std::int64_t>(sizeof(float));
  }

 private:
  int n_layers_;
  std::int64_t n_slots_;
  std::int64_t capacity_;
  int n_kv_heads_;
  int head_dim_;
  std::int64_t per_layer_ = 0;  // elements of one layer's keys (as many for its values)
  KvAllocator allocator_;
  std::shared_ptr<float> memory_;  // [n_layers, 2, n_slots, capacity, n_kv_heads, head_dim]
};

}  // namespace moesaic::engine
