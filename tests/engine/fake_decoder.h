#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "engine/decoder.h"

namespace moesaic::engine {

/// A decoder whose next token is a known function of the sequence, read back from the cache: a row
/// in a wrong slot, at a wrong position or missing changes what follows.
class FakeDecoder : public Decoder {
 public:
  static constexpr std::int64_t kVocab = 97;

  explicit FakeDecoder(std::int64_t context_length = 64) : context_length_(context_length) {}

  DecoderShape shape() const override {
    return {.n_layers = 1,
            .n_kv_heads = 1,
            .head_dim = 2,
            .vocab_size = kVocab,
            .context_length = context_length_};
  }

  /// The most likely token after a sequence.
  static std::int32_t next(const std::vector<std::int32_t>& sequence) {
    std::int64_t hash = 5;
    for (const std::int32_t id : sequence) hash = (hash * 31 + id + 1) % 1000003;
    return static_cast<std::int32_t>(hash % kVocab);
  }

  void forward(const Batch& batch, KvCache& cache, Matrix logits) override {
    ++passes;
    rows += static_cast<std::int64_t>(batch.tokens.size());
    outputs += static_cast<std::int64_t>(batch.outputs.size());
    largest = std::max(largest, static_cast<std::int64_t>(batch.tokens.size()));
    const kernels::KvLayerView view = cache.layer(0);
    for (std::size_t t = 0; t < batch.tokens.size(); ++t) {
      ASSERT_LT(batch.positions[t], view.capacity);
      ASSERT_LT(batch.slots[t], view.n_slots);
      view.keys[(batch.slots[t] * view.capacity + batch.positions[t]) * view.row()] =
          static_cast<float>(batch.tokens[t]);
    }
    ASSERT_EQ(logits.rows, static_cast<std::int64_t>(batch.outputs.size()));
    for (std::size_t o = 0; o < batch.outputs.size(); ++o) {
      const auto t = static_cast<std::size_t>(batch.outputs[o]);
      std::vector<std::int32_t> sequence;
      for (std::int32_t p = 0; p <= batch.positions[t]; ++p) {
        sequence.push_back(static_cast<std::int32_t>(
            view.keys[(batch.slots[t] * view.capacity + p) * view.row()]));
      }
      float* row = logits.row(static_cast<std::int64_t>(o));
      for (std::int64_t i = 0; i < kVocab; ++i) {
        row[i] = std::sin(static_cast<float>(i + 3 * next(sequence)));
      }
      row[next(sequence)] = 4;
    }
  }

  std::int64_t passes = 0, rows = 0, outputs = 0, largest = 0;

 private:
  std::int64_t context_length_;
};

}  // namespace moesaic::engine
