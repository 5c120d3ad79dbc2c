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

std::shared_ptr<float> allocate(std::int64_t bytes) {
  // calloc and not AlignedBuffer: the system hands out zero pages on first touch, so a long context
  // costs the memory of the positions that were written, not of all that could be.
  const std::size_t all = static_cast<std::size_t>(bytes) + kAlignment;
  const std::shared_ptr<void> memory(std::calloc(all, 1), [](void* p) { std::free(p); });
  require<InputError>(memory != nullptr, "KV cache: {} bytes are not available", bytes);
  void* p = memory.get();
  std::size_t space = all;
  return {memory,
          static_cast<float*>(std::align(kAlignment, static_cast<std::size_t>(bytes), p, space))};
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
}

HostKvCache::HostKvCache(int n_layers, std::int64_t n_slots, std::int64_t capacity, int n_kv_heads,
                         int head_dim)
    : KvCache(n_layers, n_slots, capacity, n_kv_heads, head_dim),
      per_layer_(multiply(multiply(multiply(n_slots, capacity), n_kv_heads), head_dim)) {
  const std::int64_t elements = multiply(multiply(per_layer_, 2), n_layers);
  memory_ = allocate(elements * static_cast<std::int64_t>(sizeof(float)));
}

kernels::KvLayerView HostKvCache::layer(int layer) {
  require<ShapeError>(layer >= 0 && layer < n_layers(), "KV cache: layer {} of {}", layer,
                      n_layers());
  float* keys = memory_.get() + std::int64_t{2} * layer * per_layer_;
  return {keys, keys + per_layer_, n_slots(), capacity(), n_kv_heads(), head_dim()};
}

HostKvCache& on_host(KvCache& cache) {
  auto* host = dynamic_cast<HostKvCache*>(&cache);
  require<ShapeError>(host != nullptr,
                      "KV cache of another device, expected one in the host's memory");
  return *host;
}

}  // namespace moesaic::engine
