#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "engine/kv_cache.h"
#include "kernels/base/error.h"
#include "kernels/base/view.h"
#include "kernels/draw.h"

namespace moesaic::engine {

/// Sizes that the engine must know of any decoder.
struct DecoderShape {
  int n_layers = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  std::int64_t vocab_size = 0;
  std::int64_t context_length = 0;  // positions the checkpoint was trained for
};

/// One forward pass: rows of any sequences, each with its place, and the rows whose logits are
/// wanted.
struct Batch {
  std::span<const std::int32_t> tokens;  // [n_tokens]
  std::span<const std::int32_t> slots;   // [n_tokens] sequence in the cache
  std::span<const std::int32_t>
      positions;  // [n_tokens] place in the sequence; earlier ones must be in the cache
  std::span<const std::int32_t> outputs;  // rows of this batch that want logits, ascending
};

/// Throws ShapeError unless the batch's spans fit each other and the cache, and the cache the
/// decoder; InputError for a position beyond the cache.
void check_batch(const Batch& batch, const DecoderShape& shape, const KvCache& cache);

/// What the engine asks of a model: the one interface between engine/ and models/.
class Decoder {
 public:
  virtual ~Decoder() = default;
  virtual DecoderShape shape() const = 0;
  /// Runs the batch, writes its keys and values to the cache, and the logits [outputs.size(),
  /// vocab_size]. Throws ShapeError, InputError (token id out of range, position beyond the cache).
  virtual void forward(const Batch& batch, KvCache& cache, Matrix logits) = 0;
  /// True if forward_and_draw() is there: where logits would have to be copied to be drawn from.
  virtual bool draws() const { return false; }
  /// forward(), then a token from the logits of each output as draws[i] says: ids
  /// [outputs.size()], −1 where every logit is NaN. draws and ids are as many as outputs. Throws as
  /// forward(); Error unless draws().
  virtual void forward_and_draw(const Batch& /*batch*/, KvCache& /*cache*/,
                                std::span<const kernels::Draw> /*draws*/,
                                std::span<std::int32_t> /*ids*/) {
    throw Error("decoder: it draws no tokens");
  }
  /// A cache for n_slots sequences of up to `capacity` positions in the memory that forward() works
  /// on. Throws as HostKvCache.
  virtual std::unique_ptr<KvCache> make_cache(std::int64_t n_slots, std::int64_t capacity) const {
    const DecoderShape s = shape();
    return std::make_unique<HostKvCache>(s.n_layers, n_slots, capacity, s.n_kv_heads, s.head_dim);
  }
};

}  // namespace moesaic::engine
