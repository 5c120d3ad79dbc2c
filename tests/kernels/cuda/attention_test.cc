#include "kernels/cuda/attention.h"

#include "kernels/base/error.h"
#include "tests/kernels/cuda/device.h"
#include "tests/kernels/support.h"
#include "tests/reference/ops.h"

namespace moesaic::cuda {
namespace {

struct Case {
  int n_heads = 4, n_kv_heads = 2, head_dim = 32;
  std::int64_t window = 0;
  std::int64_t capacity = 40;
  std::vector<std::int32_t> slots = {0};
  std::vector<std::int32_t> positions = {7};
  float scale = 0.2f;
};

class Attention : public OnDevice {
 protected:
  // Only keys at and before each token's position are written: reading any other is found.
  void expect_attention(const Case& c) {
    const std::int64_t n = static_cast<std::int64_t>(c.slots.size());
    const std::int64_t row = std::int64_t{c.n_kv_heads} * c.head_dim;
    const std::int64_t n_slots = n == 0 ? 1 : *std::max_element(c.slots.begin(), c.slots.end()) + 1;
    const std::size_t total = size(n_slots * c.capacity * row);
    std::vector<float> keys(total), values(total);
    DeviceBuffer<float> device_keys(total), device_values(total);
    const kernels::KvLayerView on_host{keys.data(), values.data(), n_slots,
                                       c.capacity,  c.n_kv_heads,  c.head_dim};
    kernels::KvLayerView cache = on_host;
    cache.keys = device_keys.data();
    cache.values = device_values.data();
    std::int64_t longest = 1;
    for (std::int64_t s = 0; s < n_slots; ++s) {
      std::int64_t length = 0;
      for (std::size_t t = 0; t < c.slots.size(); ++t) {
        if (c.slots[t] == s) length = std::max<std::int64_t>(length, c.positions[t] + 1);
      }
      longest = std::max(longest, length);
      const auto k = normal_values(size(length * row), static_cast<unsigned>(3 * s + 1));
      const auto v = normal_values(size(length * row), static_cast<unsigned>(3 * s + 2));
      std::copy(k.begin(), k.end(), keys.begin() + s * c.capacity * row);
      std::copy(v.begin(), v.end(), values.begin() + s * c.capacity * row);
      std::vector<std::int32_t> all(size(length)), slot(size(length), static_cast<std::int32_t>(s));
      for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::int32_t>(i);
      const auto device_all = on_device(all, stream), device_slot = on_device(slot, stream);
      const DeviceMatrix dk(k, length, row, stream), dv(v, length, row, stream);
      store_kv(dk.view(), dv.view(), {device_slot.data(), device_all.data()}, cache, stream);
      stream.synchronize();
    }
    const std::int64_t cols = std::int64_t{c.n_heads} * c.head_dim;
    const auto q = normal_values(size(n * cols), 9);
    const auto expected = reference::attention({q.data(), n, cols}, {c.slots, c.positions}, on_host,
                                               c.n_heads, c.scale, c.window);
    const auto slots = on_device(c.slots, stream), positions = on_device(c.positions, stream);
    const AttentionShape shape{c.n_heads, c.scale, c.window, std::max(longest, c.capacity)};
    const DeviceBuffer<std::byte> workspace(attention_workspace(shape, n, c.head_dim));
    const DeviceMatrix in(q, n, cols, stream), out(n, cols);
    attention(in.view(), {slots.data(), positions.data()}, cache, shape, out.view(),
              workspace.data(), stream);
    const auto y = out.host(stream);
    // Scores are below 8 in size here: their rounding, and a weighted mean's, of values below 5.
    for (std::size_t i = 0; i < y.size(); ++i) {
      ASSERT_NEAR(y[i], expected[i], 5 * (c.head_dim / 8 + 32) * kEps) << "element " << i;
    }
  }
};

TEST_F(Attention, OneTokenAtManyPositions) {
  for (const std::int32_t p : {0, 1, 3, 15, 16, 255, 256, 257, 600}) {
    expect_attention({.capacity = 601, .positions = {p}});
  }
}

TEST_F(Attention, HeadDims) {
  for (const int dim : {1, 31, 64, 65, 80, 128, 256}) {
    expect_attention({.n_heads = 2, .n_kv_heads = 1, .head_dim = dim, .scale = 0.1f});
  }
}

TEST_F(Attention, HeadsPerKvHead) {
  for (const int heads : {1, 2, 3, 4, 5, 9}) {
    expect_attention({.n_heads = 2 * heads, .n_kv_heads = 2});
  }
}

TEST_F(Attention, Windows) {
  for (const std::int64_t window : {1, 2, 100, 255, 256, 257, 1000}) {
    expect_attention({.window = window, .capacity = 600, .positions = {530}});
  }
}

TEST_F(Attention, SequencesOfDifferentLengthsAndAPrompt) {
  expect_attention(
      {.capacity = 300, .slots = {2, 0, 1, 0, 2, 2}, .positions = {0, 299, 20, 3, 1, 2}});
}

TEST_F(Attention, NoTokens) { expect_attention({.slots = {}, .positions = {}}); }

TEST_F(Attention, NamesTheShapes) {
  const DeviceMatrix q(1, 128), k(1, 64), narrow(1, 60);
  const kernels::KvLayerView cache{nullptr, nullptr, 1, 8, 2, 32};
  const auto expect_thrown = [&](Matrix in, AttentionShape shape, Matrix out) {
    EXPECT_THROW(attention(in, {}, cache, shape, out, nullptr, stream), ShapeError);
  };
  expect_thrown(q.view(), {3, 1, 0, 8}, q.view());
  expect_thrown(k.view(), {4, 1, 0, 8}, q.view());
  expect_thrown(q.view(), {4, 1, 0, 9}, q.view());
  expect_thrown(q.view(), {4, 1, 0, 8}, k.view());
  EXPECT_THROW(store_kv(k.view(), narrow.view(), {}, cache, stream), ShapeError);
}

}  // namespace
}  // namespace moesaic::cuda
