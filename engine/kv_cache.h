#pragma once

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/base/aligned_buffer.h"

namespace moesaic::engine {

/// Keys and values of every layer for n_slots sequences of up to `capacity` positions, float32.
/// Size: 2 · n_layers · n_slots · capacity · n_kv_heads · head_dim · 4 bytes.
class KvCache {
 public:
  /// Throws InputError for a size that is not positive.
  KvCache(int n_layers, std::int64_t n_slots, std::int64_t capacity, int n_kv_heads, int head_dim);

  kernels::KvLayerView layer(int layer);
  std::int64_t n_slots() const { return n_slots_; }
  std::int64_t capacity() const { return capacity_; }
  std::int64_t bytes() const { return static_cast<std::int64_t>(data_.size() * sizeof(float)); }

 private:
  std::int64_t n_slots_;
  std::int64_t capacity_;
  int n_kv_heads_;
  int head_dim_;
  std::int64_t per_layer_;     // elements of one layer's keys (as many for its values)
  AlignedBuffer<float> data_;  // [n_layers, 2, n_slots, capacity, n_kv_heads, head_dim]
};

}  // namespace moesaic::engine
