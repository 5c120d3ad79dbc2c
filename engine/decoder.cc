#include "engine/decoder.h"

#include "kernels/base/error.h"

namespace moesaic::engine {

void check_batch(const Batch& batch, const DecoderShape& shape, const KvCache& cache) {
  const std::size_t n = batch.tokens.size();
  require<ShapeError>(batch.slots.size() == n && batch.positions.size() == n,
                      "batch: {} tokens, {} slots and {} positions, expected as many of each", n,
                      batch.slots.size(), batch.positions.size());
  require<ShapeError>(cache.n_layers() == shape.n_layers, "KV cache of {} layers, expected {}",
                      cache.n_layers(), shape.n_layers);
  for (std::size_t t = 0; t < n; ++t) {
    require<ShapeError>(batch.slots[t] >= 0 && batch.slots[t] < cache.n_slots(),
                        "batch: row {} is of slot {}, the cache has {}", t, batch.slots[t],
                        cache.n_slots());
    require<InputError>(batch.positions[t] >= 0 && batch.positions[t] < cache.capacity(),
                        "batch: row {} stands at position {}, the cache holds {}", t,
                        batch.positions[t], cache.capacity());
  }
  std::int64_t previous = -1;
  for (const std::int32_t row : batch.outputs) {
    require<ShapeError>(row > previous && row < static_cast<std::int64_t>(n),
                        "batch: output row {} after {}, expected ascending rows of {}", row,
                        previous, n);
    previous = row;
  }
}

}  // namespace moesaic::engine
