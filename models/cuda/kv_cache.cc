#include "models/cuda/kv_cache.h"

#include <algorithm>
#include <utility>

#include "kernels/base/error.h"

namespace moesaic::models {
namespace {

// Allocated at a time: some hundred positions of a small model, one page of the largest.
constexpr std::int64_t kChunkBytes = 32 << 20;

std::int64_t pages_for(std::int64_t positions) {
  return (positions + cuda::kKvPage - 1) / cuda::kKvPage;
}

}  // namespace

CudaKvCache::CudaKvCache(const engine::DecoderShape& shape, std::int64_t n_slots,
                         std::int64_t capacity)
    : KvCache(shape.n_layers, n_slots, capacity, shape.n_kv_heads, shape.head_dim),
      row_(std::int64_t{shape.n_kv_heads} * shape.head_dim),
      pages_per_slot_(pages_for(capacity)),
      held_(static_cast<std::size_t>(n_slots)),
      host_table_(static_cast<std::size_t>(n_slots * pages_per_slot_)),
      table_(host_table_.span().size()) {
  std::ranges::fill(host_table_.span(), nullptr);
}

float** CudaKvCache::entry(std::int64_t slot, std::int64_t page) const {
  return host_table_.span().data() + slot * pages_per_slot_ + page;
}

// Last pages first, so that the slot takes the same ones again.
void CudaKvCache::release(std::int64_t slot) {
  std::int64_t& held = held_[static_cast<std::size_t>(slot)];
  while (held > 0) free_.push_back(std::exchange(*entry(slot, --held), nullptr));
}

void CudaKvCache::allocate() {
  const std::int64_t page = std::int64_t{2} * n_layers() * cuda::kKvPage * row_;
  const auto page_bytes = page * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t all = n_slots() * pages_per_slot_ - bytes() / page_bytes;
  const std::int64_t n = std::clamp<std::int64_t>(kChunkBytes / page_bytes, 1, all);
  try {
    chunks_.emplace_back(static_cast<std::size_t>(n * page));
  } catch (const DeviceError& e) {
    throw DeviceError(fmt::format("KV cache of {} positions in {} bytes, for more: {}",
                                  bytes() / page_bytes * cuda::kKvPage, bytes(), e.what()));
  }
  for (std::int64_t i = n; i-- > 0;) free_.push_back(chunks_.back().data() + i * page);
}

void CudaKvCache::reach(const engine::Batch& batch, const cuda::Stream& stream) {
  for (std::size_t t = 0; t < batch.tokens.size(); ++t) {
    if (batch.positions[t] == 0) release(batch.slots[t]);
  }
  // Entries of the table that change: [first, last).
  float** first = host_table_.span().data() + host_table_.span().size();
  float** last = host_table_.span().data();
  for (std::size_t t = 0; t < batch.tokens.size(); ++t) {
    std::int64_t& held = held_[static_cast<std::size_t>(batch.slots[t])];
    while (held < pages_for(std::int64_t{batch.positions[t]} + 1)) {
      if (free_.empty()) allocate();
      float** to = entry(batch.slots[t], held++);
      *to = free_.back();
      free_.pop_back();
      first = std::min(first, to);
      last = std::max(last, to + 1);
    }
  }
  if (first >= last) return;
  const auto at = static_cast<std::size_t>(first - host_table_.span().data()) * sizeof(float*);
  cuda::copy_bytes_in(reinterpret_cast<std::byte*>(table_.data()) + at, first,
                      static_cast<std::size_t>(last - first) * sizeof(float*), stream);
}

cuda::PagedKv CudaKvCache::layer(int layer) const {
  require<ShapeError>(layer >= 0 && layer < n_layers(), "KV cache: layer {} of {}", layer,
                      n_layers());
  const std::int64_t part = cuda::kKvPage * row_, keys = std::int64_t{2} * layer * part;
  return {table_.data(), pages_per_slot_, keys, keys + part, n_kv_heads(), head_dim()};
}

std::int64_t CudaKvCache::bytes() const {
  std::int64_t sum = 0;
  for (const auto& chunk : chunks_) {
    sum += static_cast<std::int64_t>(chunk.size() * sizeof(float));
  }
  return sum;
}

}  // namespace moesaic::models
