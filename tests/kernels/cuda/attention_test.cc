#include "kernels/cuda/attention.h"

#include "kernels/base/error.h"
#include "tests/kernels/cuda/attention_case.h"

namespace moesaic::cuda {
namespace {

class Attention : public OnDevice {
 protected:
  void expect_attention(const AttentionCase& c) {
    AttentionOperands operands(c, stream);
    const auto expected = operands.expected();
    const auto n = static_cast<std::int64_t>(c.slots.size());
    const AttentionShape shape = operands.shape();
    const DeviceBuffer<std::byte> workspace(attention_workspace(shape, n, c.head_dim));
    const DeviceMatrix out(n, operands.cols());
    attention(operands.q(), operands.places(), operands.cache(), shape, out.view(),
              workspace.data(), stream);
    const auto y = out.host(stream);
    // Scores are below 8 in size here: their rounding, and a weighted mean's, of values below 5.
    for (std::size_t i = 0; i < y.size(); ++i) {
      ASSERT_NEAR(y[i], expected[i], 5 * (c.head_dim / 8 + 32) * kEps) << "element " << i;
    }
  }
};

TEST_F(Attention, OneTokenAtManyPositions) {
  for (const std::int32_t p : {0, 1, 3, 15, 16, 63, 64, 65, 255, 256, 257, 600}) {
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
  const PagedKv cache{nullptr, 1, 0, 0, 2, 32};
  const auto expect_thrown = [&](Matrix in, AttentionShape shape, Matrix out) {
    EXPECT_THROW(attention(in, {}, cache, shape, out, nullptr, stream), ShapeError);
  };
  expect_thrown(q.view(), {3, 1, 0, 8}, q.view());
  expect_thrown(k.view(), {4, 1, 0, 8}, q.view());
  expect_thrown(q.view(), {4, 1, 0, 65}, q.view());
  expect_thrown(q.view(), {4, 1, 0, 8}, k.view());
  EXPECT_THROW(store_kv(k.view(), narrow.view(), {}, cache, stream), ShapeError);
}

}  // namespace
}  // namespace moesaic::cuda
