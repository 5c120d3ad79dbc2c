#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "engine/generation.h"
#include "tests/kernels/cuda/device.h"
#include "tests/models/tiny_self_routed.h"

namespace moesaic::models {

using Rows = std::vector<std::vector<float>>;

/// One decoder with a cache of its own making.
struct Runner {
  explicit Runner(engine::Decoder& d, std::int64_t n_slots = 3, std::int64_t capacity = 64)
      : decoder(d), cache(d.make_cache(n_slots, capacity)) {}

  Rows run(const std::vector<std::int32_t>& tokens, const std::vector<std::int32_t>& slots,
           const std::vector<std::int32_t>& positions, const std::vector<std::int32_t>& outputs) {
    std::vector<float> logits(outputs.size() * TinyModel::kVocab);
    decoder.forward(
        {tokens, slots, positions, outputs}, *cache,
        Matrix(logits.data(), static_cast<std::int64_t>(outputs.size()), TinyModel::kVocab));
    Rows rows;
    for (auto at = logits.begin(); at != logits.end(); at += TinyModel::kVocab) {
      rows.emplace_back(at, at + TinyModel::kVocab);
    }
    return rows;
  }

  /// One sequence in pieces of n tokens, logits of every row.
  Rows run_pieces(const std::vector<std::int32_t>& ids, std::size_t n, std::int32_t slot = 0) {
    Rows rows;
    for (std::size_t begin = 0; begin < ids.size(); begin += n) {
      const std::size_t end = std::min(begin + n, ids.size());
      std::vector<std::int32_t> tokens, slots, positions, outputs;
      for (std::size_t t = begin; t < end; ++t) {
        tokens.push_back(ids[t]);
        slots.push_back(slot);
        positions.push_back(static_cast<std::int32_t>(t));
        outputs.push_back(static_cast<std::int32_t>(t - begin));
      }
      const Rows piece = run(tokens, slots, positions, outputs);
      rows.insert(rows.end(), piece.begin(), piece.end());
    }
    return rows;
  }

  engine::Decoder& decoder;
  std::unique_ptr<engine::KvCache> cache;
};

/// Largest difference over the root mean square of the expected logits.
inline double relative_error(const Rows& found, const std::vector<std::vector<double>>& expected) {
  EXPECT_EQ(found.size(), expected.size());
  double largest = 0, squares = 0, n = 0;
  for (std::size_t t = 0; t < std::min(found.size(), expected.size()); ++t) {
    for (std::size_t i = 0; i < expected[t].size(); ++i) {
      largest = std::max(largest, std::abs(found[t][i] - expected[t][i]));
      squares += expected[t][i] * expected[t][i];
      ++n;
    }
  }
  return largest / std::sqrt(squares / n);
}

/// Greedy continuation of one prompt.
inline std::vector<std::int32_t> greedy(engine::Decoder& decoder,
                                        const std::vector<std::int32_t>& prompt, int n_tokens) {
  engine::Request request;
  request.prompt = prompt;
  request.max_tokens = n_tokens;
  request.sampling.temperature = 0;
  return engine::generate(decoder, {&request, 1}, [](std::int32_t) { return std::string("."); }, {})
      .front()
      .tokens;
}

}  // namespace moesaic::models
