#include "engine/kv_cache.h"

#include <cstdlib>
#include <limits>

#include "kernels/base/error.h"

namespace moesaic::engine {
namespace {

constexpr std::size_t kAlignment = 64;

// a · b, or InputError if the cache would not fit an address space.
std::int64_t multiply(std::int64_t a, std::int64_t b) {
  require<InputError>(a <= std::numeric_limits<std::int64_t>::max() / 64 / b,
                      "KV cache: its size overflows");
  return a * b;
}

}  // namespace

KvCache::KvCache(int n_layers, std::int64_t n_slots, std::int64_t capacity, int n_kv_heads,
                 int head_dim)
    : n_layers_(n_layers),
      n_slots_(n_slots),
      capacity_(capacity),
      n_kv_heads_(n_kv_heads),
      head_dim_(head_dim) {
  require<InputError>(
      n_layers > 0 && n_slots > 0 && capacity > 0 && n_kv_heads > 0 && head_dim > 0,
      "KV cache: {} layers, {} slots, {} positions, {} heads of {} given, expected all positive",
      n_layers, n_slots, capacity, n_kv_heads, head_dim);
  per_layer_ = multiply(multiply(multiply(n_slots, capacity), n_kv_heads), head_dim);
  const std::int64_t elements = multiply(multiply(per_layer_, 2), n_layers);
  // calloc and not AlignedBuffer: the system hands out zero pages on first touch, so a long context
  // costs the memory of the positions that were written, not of all that could be.
  memory_.reset(std::calloc(static_cast<std::size_t>(elements) * sizeof(float) + kAlignment, 1));
  require<InputError>(memory_ != nullptr,
                      "KV cache: {} bytes for {} slots of {} positions are not available",
                      elements * static_cast<std::int64_t>(sizeof(float)), n_slots, capacity);
  std::size_t space = static_cast<std::size_t>(elements) * sizeof(float) + kAlignment;
  void* p = memory_.get();
  data_ = static_cast<float*>(
      std::align(kAlignment, static_cast<std::size_t>(elements) * sizeof(float), p, space));
}

kernels::KvLayerView KvCache::layer(int layer) {
  require<ShapeError>(layer >= 0 && layer < n_layers_, "KV cache: layer {} of {}", layer,
                      n_layers_);
  float* keys = data_ + std::int64_t{2} * layer * per_layer_;
  return {keys, keys + per_layer_, n_slots_, capacity_, n_kv_heads_, head_dim_};
}

}  // namespace moesaic::engine
