#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/decoder.h"

namespace moesaic::engine {

/// A decoder that draws tokens itself, in the way that kernels::Draw describes: a whole sort and
/// plain sums. Bases on another's logits.
template <class Base>
class Drawing : public Base {
 public:
  using Base::Base;
  bool draws() const override { return true; }
  void forward_and_draw(const Batch& batch, KvCache& cache, std::span<const kernels::Draw> draws,
                        std::span<std::int32_t> ids) override {
    const auto cols = static_cast<std::size_t>(this->shape().vocab_size);
    std::vector<float> logits(ids.size() * cols);
    this->forward(batch, cache,
                  Matrix(logits.data(), std::ssize(ids), static_cast<std::int64_t>(cols)));
    for (std::size_t i = 0; i < ids.size(); ++i) {
      ids[i] = draw(std::span(logits).subspan(i * cols, cols), draws[i]);
    }
    n_drawn += std::ssize(ids);
  }

  static std::int32_t draw(std::span<const float> logits, const kernels::Draw& d) {
    struct Token {
      double logit;
      std::int32_t id;
    };
    std::vector<Token> tokens;
    for (std::size_t i = 0; i < logits.size(); ++i) {
      if (!std::isnan(logits[i])) tokens.push_back({logits[i], static_cast<std::int32_t>(i)});
    }
    if (tokens.empty()) return -1;
    const auto before = [](const Token& a, const Token& b) {
      return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
    };
    const Token best = *std::min_element(tokens.begin(), tokens.end(), before);
    if (d.temperature == 0) return best.id;
    const auto likelihood = [&](const Token& t, double temperature) {
      return std::exp((t.logit - best.logit) / temperature);
    };
    const auto sum = [&](double temperature) {
      double total = 0;
      for (const Token& t : tokens) total += likelihood(t, temperature);
      return total;
    };
    const bool cuts = d.top_k > 0 && static_cast<std::size_t>(d.top_k) < logits.size();
    if (cuts || d.top_p < 1) std::sort(tokens.begin(), tokens.end(), before);
    if (cuts) tokens.resize(std::min(tokens.size(), static_cast<std::size_t>(d.top_k)));
    if (d.top_p < 1) {
      const double target = d.top_p * sum(1);
      double reached = 0;
      std::size_t n = 0;
      while (n < tokens.size() && (n == 0 || reached < target))
        reached += likelihood(tokens[n++], 1);
      tokens.resize(n);
    }
    std::erase_if(tokens, [&](const Token& t) { return likelihood(t, 1) < d.min_p; });
    const double target = d.random * sum(d.temperature);
    double reached = 0;
    for (const Token& t : tokens) {
      reached += likelihood(t, d.temperature);
      if (reached > target) return t.id;
    }
    return tokens.back().id;
  }

  std::int64_t n_drawn = 0;
};

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
    const kernels::KvLayerView view = on_host(cache).layer(0);
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
