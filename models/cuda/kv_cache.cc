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

std::int64_t CudaKvCache::page_bytes() const {
  return std::int64_t{2} * n_layers() * cuda::kKvPage * row_ *
         static_cast<std::int64_t>(sizeof(float));
}

void CudaKvCache::allocate() {
  const std::int64_t have = bytes() / page_bytes(), all = n_slots() * pages_per_slot_ - have;
  const std::int64_t n = std::clamp<std::int64_t>(kChunkBytes / page_bytes(), 1, all);
  try {
    chunks_.emplace_back(static_cast<std::size_t>(n * page_bytes()));
  } catch (const DeviceError& e) {
    throw DeviceError(fmt::format("KV cache of {} positions in {} bytes, for more: {}",
                                  have * cuda::kKvPage, bytes(), e.what()));
  }
  std::vector<float*> pages;
  for (std::int64_t i = 0; i < n; ++i) {
    pages.push_back(
        chunks_.back().take<float>(static_cast<std::size_t>(page_bytes()) / sizeof(float)).data());
  }
  free_.insert(free_.end(), pages.rbegin(), pages.rend());  // the first is the next taken
}

void CudaKvCache::reach(const engine::Batch& batch, const cuda::Stream& stream) {
  std::vector<std::int64_t> wanted = held_;
  for (std::size_t t = 0; t < batch.tokens.size(); ++t) {
    if (batch.positions[t] != 0) continue;
    release(batch.slots[t]);
    wanted[static_cast<std::size_t>(batch.slots[t])] = 0;
  }
  std::int64_t missing = 0;
  for (std::size_t t = 0; t < batch.tokens.size(); ++t) {
    std::int64_t& pages = wanted[static_cast<std::size_t>(batch.slots[t])];
    const std::int64_t more = pages_for(std::int64_t{batch.positions[t]} + 1) - pages;
    if (more <= 0) continue;
    pages += more;
    missing += more;
  }
  while (std::ssize(free_) < missing) allocate();  // before any is given to a sequence
  // Entries of the table that change: [first, last).
  float** first = host_table_.span().data() + host_table_.span().size();
  float** last = host_table_.span().data();
  for (std::int64_t slot = 0; missing > 0 && slot < n_slots(); ++slot) {
    std::int64_t& held = held_[static_cast<std::size_t>(slot)];
    for (; held < wanted[static_cast<std::size_t>(slot)]; ++held, --missing) {
      float** to = entry(slot, held);
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
  for (const cuda::Arena& chunk : chunks_) sum += static_cast<std::int64_t>(chunk.size());
  return sum;
}

}  // namespace moesaic::models
