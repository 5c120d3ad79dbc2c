#include "kernels/attention.h"

#include <algorithm>

#include "kernels/base/error.h"
#include "tests/kernels/support.h"
#include "tests/reference/ops.h"

namespace moesaic {
namespace {

using kernels::KvLayerView;
using kernels::TokenPlaces;

struct Heads {
  int n_heads;
  int n_kv_heads;
  int head_dim;
};

constexpr Heads kSmolLm = {9, 3, 64};
constexpr Heads kGemma = {4, 1, 256};
constexpr Heads kShapes[] = {kSmolLm, kGemma, {4, 4, 64}, {4, 1, 20}, {6, 2, 5}, {16, 1, 48}};

// A cache and a batch. Only keys that the batch may see hold numbers; all others are NaN, so that
// one read outside them spoils the result.
struct Case {
  Case(Heads h, std::int64_t n_slots, std::int64_t cap, std::int64_t win = 0)
      : heads(h), capacity(cap), window(win) {
    const std::size_t n = size(n_slots * capacity * h.n_kv_heads * h.head_dim);
    key_values = normal_values(n, 11);
    value_values = normal_values(n, 12);
    keys.assign(n, kNan);
    values.assign(n, kNan);
    cache = {keys.data(), values.data(), n_slots, capacity, h.n_kv_heads, h.head_dim};
  }

  void add(std::int32_t slot, std::int64_t first, std::int64_t n) {
    for (std::int64_t position = first; position < first + n; ++position) {
      slots.push_back(slot);
      positions.push_back(static_cast<std::int32_t>(position));
      const std::int64_t begin = window == 0 ? 0 : std::max<std::int64_t>(0, position - window + 1);
      const auto from = static_cast<std::ptrdiff_t>((slot * capacity + begin) * cache.row());
      const auto to = static_cast<std::ptrdiff_t>((slot * capacity + position + 1) * cache.row());
      std::copy(key_values.begin() + from, key_values.begin() + to, keys.begin() + from);
      std::copy(value_values.begin() + from, value_values.begin() + to, values.begin() + from);
    }
    q = normal_values(slots.size() * size(width()), 13);
  }

  std::int64_t width() const { return std::int64_t{heads.n_heads} * heads.head_dim; }
  std::int64_t n_tokens() const { return static_cast<std::int64_t>(slots.size()); }
  float scale() const { return 1 / std::sqrt(static_cast<float>(heads.head_dim)); }
  TokenPlaces places() const { return {slots, positions}; }

  std::vector<float> run(Lender& lender) const {
    std::vector<float> out(q.size(), kNan);
    kernels::attention(lender.ctx, {q.data(), n_tokens(), width()}, places(), cache, heads.n_heads,
                       scale(), window, {out.data(), n_tokens(), width()});
    return out;
  }

  // A score is off by about √head_dim roundings of |q| |k|, a weight by twice that, and the sum of
  // n weighted values by √n more and a handful.
  void check(Lender& lender) const {
    const std::vector<float> out = run(lender);
    const std::vector<double> expected = reference::attention(
        {q.data(), n_tokens(), width()}, places(), cache, heads.n_heads, scale(), window);
    const double dim = heads.head_dim;
    const auto n_keys = static_cast<double>(capacity);
    double largest_q = 0, largest_k = 0, largest_v = 0;
    for (const float x : q) largest_q = std::max(largest_q, std::abs(double{x}));
    for (const float x : key_values) largest_k = std::max(largest_k, std::abs(double{x}));
    for (const float x : value_values) largest_v = std::max(largest_v, std::abs(double{x}));
    const double score = double{scale()} * largest_q * largest_k * dim / 4;  // |q| |k| at most
    const double tolerance =
        kEps * largest_v * (2 * std::sqrt(dim) * score / 4 + std::sqrt(n_keys) + 8);
    for (std::size_t i = 0; i < out.size(); ++i) {
      ASSERT_NEAR(out[i], expected[i], tolerance)
          << "element " << i << ", heads " << heads.n_heads << "/" << heads.n_kv_heads
          << ", head_dim " << heads.head_dim << ", window " << window << ", row at position "
          << positions[i / size(width())];
    }
  }

  Heads heads;
  std::int64_t capacity;
  std::int64_t window;
  std::vector<float> key_values, value_values;  // what the cache would hold in full
  std::vector<float> keys, values, q;
  std::vector<std::int32_t> slots, positions;
  KvLayerView cache;
};

class Attention : public OnEachTarget {};

TEST_P(Attention, PrefillOfManyLengths) {
  Lender lender(2);
  for (const Heads& heads : kShapes) {
    for (const std::int64_t n : {1, 2, 5, 33, 130, 200}) {
      Case c(heads, 1, n);
      c.add(0, 0, n);
      c.check(lender);
    }
  }
}

TEST_P(Attention, ContinuesASequence) {
  Lender lender(2);
  for (const Heads& heads : kShapes) {
    for (const std::int64_t n : {1, 2, 40}) {
      for (const std::int64_t before : {1, 127, 128, 129, 300}) {
        Case c(heads, 1, before + n);
        c.add(0, before, n);
        c.check(lender);
      }
    }
  }
}

TEST_P(Attention, WindowsTouchNoKeyOutside) {
  Lender lender(2);
  for (const Heads& heads : {kSmolLm, kGemma, Heads{4, 1, 20}}) {
    for (const std::int64_t window : {1, 31, 130, 512}) {
      for (const std::int64_t n : {1, 80}) {
        for (const std::int64_t before : {0, 150}) {
          Case c(heads, 2, before + n + 3, window);
          c.add(1, before, n);
          c.check(lender);
        }
      }
    }
  }
}

TEST_P(Attention, SeveralSequencesInOneBatch) {
  Lender lender(2);
  for (const std::int64_t window : {0, 1, 9}) {
    for (const Heads& heads : kShapes) {
      Case c(heads, 5, 260, window);
      c.add(3, 259, 1);  // at the end of its capacity
      c.add(0, 100, 1);
      c.add(4, 0, 60);
      c.add(1, 200, 50);
      c.add(2, 0, 1);
      c.add(1, 250, 3);
      c.check(lender);
    }
  }
}

TEST_P(Attention, RowsInAnyOrder) {
  Lender lender(2);
  Case c({4, 2, 32}, 2, 300, 50);
  for (const std::int64_t position : {299, 0, 1, 120, 2, 119, 120}) {
    c.add(position % 2, position, 1);
  }
  c.add(0, 200, 2);
  c.add(1, 202, 2);
  c.check(lender);
}

TEST_P(Attention, EmptyBatch) {
  Lender lender(2);
  Case c(kSmolLm, 1, 4);
  EXPECT_TRUE(c.run(lender).empty());
}

TEST_P(Attention, SameForAnyThreadCount) {
  for (const Heads& heads : kShapes) {
    Case c(heads, 3, 400);
    c.add(0, 0, 150);
    c.add(1, 399, 1);
    c.add(2, 30, 41);
    Lender one(1);
    const auto expected = c.run(one);
    for (const int threads : {2, 3, 7}) {
      Lender lender(threads);
      EXPECT_EQ(c.run(lender), expected);
      EXPECT_EQ(lender.tally.total(), one.tally.total());
    }
  }
}

TEST_P(Attention, SameWhateverSharesTheBatch) {
  Lender lender(2);
  Case alone(kSmolLm, 2, 300);
  alone.add(0, 170, 60);
  Case crowd(kSmolLm, 2, 300);
  crowd.add(0, 140, 90);
  crowd.add(1, 0, 77);
  std::copy(alone.q.begin(), alone.q.end(),
            crowd.q.begin() + static_cast<std::ptrdiff_t>(30 * crowd.width()));
  const auto expected = alone.run(lender);
  const auto out = crowd.run(lender);
  EXPECT_TRUE(std::equal(expected.begin(), expected.end(),
                         out.begin() + static_cast<std::ptrdiff_t>(30 * crowd.width())));
}

TEST_P(Attention, OutputMayBeTheQueries) {
  Lender lender(2);
  Case c(kSmolLm, 1, 100);
  c.add(0, 0, 100);
  const auto expected = c.run(lender);
  kernels::attention(lender.ctx, {c.q.data(), 100, c.width()}, c.places(), c.cache, 9, c.scale(), 0,
                     {c.q.data(), 100, c.width()});
  EXPECT_EQ(c.q, expected);
}

TEST_P(Attention, EqualScoresGiveTheMean) {
  Lender lender;
  Case c({2, 1, 16}, 1, 200);
  c.add(0, 199, 1);
  std::fill(c.q.begin(), c.q.end(), 0.0f);
  const auto out = c.run(lender);
  for (std::size_t i = 0; i < 16; ++i) {
    double mean = 0;
    for (std::size_t p = 0; p < 200; ++p) mean += c.values[p * 16 + i] / 200.0;
    EXPECT_NEAR(out[i], mean, 20 * kEps);
    EXPECT_EQ(out[16 + i], out[i]);
  }
}

TEST_P(Attention, HugeScoresPickTheLargest) {
  Lender lender;
  for (const std::int64_t n : {1, 150}) {  // by dot products, and packed
    Case c({1, 1, 16}, 1, 150);
    c.add(0, 150 - n, n);
    std::fill(c.keys.begin(), c.keys.end(), 0.0f);
    for (std::size_t p = 0; p < 150; ++p) c.keys[p * 16] = -static_cast<float>(p) * 1e5f;
    std::fill(c.q.begin(), c.q.end(), 1.0f);
    const auto out = c.run(lender);
    for (std::size_t i = 0; i < out.size(); ++i) ASSERT_EQ(out[i], c.values[i % 16]);
  }
}

TEST_P(Attention, ScoresOfMinusInfinityWeighNothing) {
  Lender lender;
  for (const std::int64_t n : {1, 20}) {
    Case c({1, 1, 16}, 1, 200);
    c.add(0, 200 - n, n);
    // A whole tile of keys and more, before one that counts.
    for (std::size_t p = 0; p < 150; ++p) c.keys[p * 16] = -kInf;
    for (std::size_t i = 0; i < c.q.size(); i += 16) c.q[i] = 1.0f;
    const auto out = c.run(lender);
    const auto expected =
        reference::attention({c.q.data(), n, 16}, c.places(), c.cache, 1, c.scale(), 0);
    for (std::size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], expected[i], 1e-5);
  }
}

TEST_P(Attention, NanQueryStaysInItsRow) {
  Lender lender;
  for (const std::int64_t n : {3, 40}) {
    Case c(kSmolLm, 1, 140 + n);
    c.add(0, 140, n);
    c.q[size(c.width()) + 5] = kNan;  // second token, head 0
    const auto out = c.run(lender);
    for (std::size_t i = 0; i < out.size(); ++i) {
      ASSERT_EQ(std::isnan(out[i]), i >= size(c.width()) && i < size(c.width()) + 64) << i;
    }
  }
}

TEST_P(Attention, CountsTheBytesItReads) {
  Lender lender(2);
  Case c(kSmolLm, 2, 600);
  c.add(0, 511, 1);
  (void)c.run(lender);
  EXPECT_EQ(lender.tally.bytes(Traffic::KvCache), 2 * 512 * 192 * 4);
  lender.tally.reset();
  Case limited(kGemma, 1, 600, 512);
  limited.add(0, 599, 1);
  (void)limited.run(lender);
  EXPECT_EQ(lender.tally.bytes(Traffic::KvCache), 2 * 512 * 256 * 4);
  EXPECT_EQ(lender.tally.total(), lender.tally.bytes(Traffic::KvCache));
}

TEST_P(Attention, SteadyStateAllocatesNothing) {
  Lender lender(2);
  Case c(kGemma, 1, 300);
  c.add(0, 0, 300);
  (void)c.run(lender);
  const std::size_t capacity = lender.workspace.capacity();
  for (int i = 0; i < 3; ++i) (void)c.run(lender);
  EXPECT_EQ(lender.workspace.capacity(), capacity);
}

INSTANTIATE_TEST_SUITE_P(Targets, Attention, every_target(), target_name);

TEST(StoreKv, WritesItsPlacesOnly) {
  Lender lender(2);
  for (const std::int64_t n : {1, 6, 150}) {
    const std::int64_t capacity = 200, row = 2 * 20;
    std::vector<float> keys(size(3 * capacity * row), -1.0f), values(keys);
    auto expected_keys = keys, expected_values = keys;
    const KvLayerView cache{keys.data(), values.data(), 3, capacity, 2, 20};
    const auto k = normal_values(size(n * row), 1), v = normal_values(size(n * row), 2);
    std::vector<std::int32_t> slots, positions;
    for (std::int64_t t = 0; t < n; ++t) {
      slots.push_back(static_cast<std::int32_t>(t % 3));
      positions.push_back(static_cast<std::int32_t>(capacity - 1 - t));
      const auto at =
          static_cast<std::ptrdiff_t>((slots.back() * capacity + positions.back()) * row);
      std::copy_n(k.begin() + t * row, row, expected_keys.begin() + at);
      std::copy_n(v.begin() + t * row, row, expected_values.begin() + at);
    }
    kernels::store_kv(lender.ctx, {k.data(), n, row}, {v.data(), n, row}, {slots, positions},
                      cache);
    EXPECT_EQ(keys, expected_keys);
    EXPECT_EQ(values, expected_values);
  }
}

TEST(StoreKv, OutOfRangeThrowsAndWritesNothing) {
  Lender lender;
  std::vector<float> keys(2 * 4 * 8, 0.0f), values(keys);
  const auto before = keys;
  const KvLayerView cache{keys.data(), values.data(), 2, 4, 1, 8};
  const std::vector<float> k(16, 1.0f);
  const auto store = [&](std::int32_t slot, std::int32_t position) {
    const std::vector<std::int32_t> slots = {0, slot}, positions = {0, position};
    kernels::store_kv(lender.ctx, {k.data(), 2, 8}, {k.data(), 2, 8}, {slots, positions}, cache);
  };
  EXPECT_THROW(store(2, 0), ShapeError);
  EXPECT_THROW(store(-1, 0), ShapeError);
  EXPECT_THROW(store(0, 4), ShapeError);
  EXPECT_THROW(store(0, -1), ShapeError);
  EXPECT_EQ(keys, before);
  EXPECT_NO_THROW(store(1, 3));
}

TEST(AttentionErrors, NamesTheShapes) {
  Lender lender;
  Case c({4, 2, 8}, 1, 10);
  c.add(0, 9, 1);
  std::vector<float> out(32);
  const auto call = [&](int n_heads, std::int64_t d, std::int64_t window, std::int64_t rows) {
    kernels::attention(lender.ctx, {c.q.data(), 1, d}, c.places(), c.cache, n_heads, 1.0f, window,
                       {out.data(), rows, d});
  };
  EXPECT_NO_THROW(call(4, 32, 0, 1));
  EXPECT_THROW(call(3, 24, 0, 1), ShapeError);
  EXPECT_THROW(call(0, 0, 0, 1), ShapeError);
  EXPECT_THROW(call(4, 30, 0, 1), ShapeError);
  EXPECT_THROW(call(4, 32, -1, 1), ShapeError);
  EXPECT_THROW(call(4, 32, 0, 2), ShapeError);
  c.positions[0] = 10;
  EXPECT_THROW(call(4, 32, 0, 1), ShapeError);
}

}  // namespace
}  // namespace moesaic
