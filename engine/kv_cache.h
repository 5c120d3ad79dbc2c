#pragma once

#include <cstdint>
#include <memory>

#include "kernels/attention.h"

namespace moesaic::engine {

/// Keys and values of every layer for n_slots sequences of up to `capacity` positions each,
/// float32, in the memory of the decoder that made it.
class KvCache {
 public:
  virtual ~KvCache() = default;

  int n_layers() const { return n_layers_; }
  std::int64_t n_slots() const { return n_slots_; }
  std::int64_t capacity() const { return capacity_; }

 protected:
  /// Throws InputError for a size that is not positive.
  KvCache(int n_layers, std::int64_t n_slots, std::int64_t capacity, int n_kv_heads, int head_dim);

  int n_kv_heads() const { return n_kv_heads_; }
  int head_dim() const { return head_dim_; }

 private:
  int n_layers_;
  std::int64_t n_slots_;
  std::int64_t capacity_;
  int n_kv_heads_;
  int head_dim_;
};

/// In the host's memory: one piece of 2 · n_layers · n_slots · capacity · n_kv_heads · head_dim · 4
/// bytes, zero, of which the system provides what has been written (pages come on first touch).
class HostKvCache final : public KvCache {
 public:
  /// Throws InputError, also for a size that is not available.
  HostKvCache(int n_layers, std::int64_t n_slots, std::int64_t capacity, int n_kv_heads,
              int head_dim);

  kernels::KvLayerView layer(int layer);
  std::int64_t bytes() const {
    return 2 * n_layers() * per_layer_ * static_cast<std::int64_t>(sizeof(float));
  }

 private:
  std::int64_t per_layer_ = 0;     // elements of one layer's keys (as many for its values)
  std::shared_ptr<float> memory_;  // [n_layers, 2, n_slots, capacity, n_kv_heads, head_dim]
};

/// A decoder's cache as one in the host's memory. Throws ShapeError if it is another decoder's.
HostKvCache& on_host(KvCache& cache);

}  // namespace moesaic::engine
