#include "kernels/cuda/prompt_attention.h"

#include <random>

#include "kernels/base/error.h"
#include "kernels/linear.h"
#include "tests/kernels/cuda/attention_case.h"

namespace moesaic::cuda {
namespace {

// Tokens [begin, end) of one sequence.
AttentionCase prompt(std::int32_t begin, std::int32_t end, AttentionCase c = {}) {
  c.slots.assign(static_cast<std::size_t>(end - begin), 0);
  c.positions.resize(c.slots.size());
  for (std::int32_t p = begin; p < end; ++p) c.positions[static_cast<std::size_t>(p - begin)] = p;
  c.capacity = std::max<std::int64_t>(end, 1);
  return c;
}

class PromptAttentionTest : public OnDevice {
 protected:
  // Against the loops over the same operands, rounded to bfloat16. What is left: a weight's own
  // rounding to it, and float32 sums of head_dim terms in each score, below head_dim · scale here.
  void expect_attention(const AttentionCase& c) {
    AttentionOperands operands(c, stream);
    const auto n = static_cast<std::int64_t>(c.slots.size());
    const DeviceMatrix out(n, operands.cols());
    prompt_attention(operands.q(), operands.places(), operands.cache(), operands.shape(),
                     out.view(), stream);
    const auto y = out.host(stream);
    for (auto* part : {&operands.keys, &operands.values, &operands.queries}) {
      kernels::round_to_bf16(*part, *part);
    }
    const auto expected = operands.expected();
    for (float& v : operands.values) v = std::fabs(v);
    const auto magnitude = operands.expected();
    const double dim = c.head_dim, score = dim * kEps * (1 + dim * c.scale);
    for (std::size_t i = 0; i < y.size(); ++i) {
      ASSERT_NEAR(y[i], expected[i], (0x1p-8 + 2 * score) * magnitude[i])
          << "element " << i % size(operands.cols()) << " of token " << i / size(operands.cols());
    }
  }
};

TEST_F(PromptAttentionTest, OneTokenAtManyPositions) {
  for (const std::int32_t p : {0, 1, 15, 63, 64, 65, 200}) expect_attention(prompt(p, p + 1));
}

TEST_F(PromptAttentionTest, NumbersOfTokens) {
  for (const std::int32_t n : {2, 15, 16, 17, 63, 64, 65, 130}) expect_attention(prompt(0, n));
}

TEST_F(PromptAttentionTest, PiecesOfAPrompt) { expect_attention(prompt(97, 170)); }

TEST_F(PromptAttentionTest, HeadDims) {
  for (const int dim : {4, 16, 60, 64, 68, 80, 128, 132, 256}) {
    expect_attention(
        prompt(20, 69, {.n_heads = 2, .n_kv_heads = 1, .head_dim = dim, .scale = 0.1f}));
  }
}

TEST_F(PromptAttentionTest, HeadsPerKvHead) {
  for (const int heads : {1, 3, 4}) {
    expect_attention(prompt(0, 40, {.n_heads = 2 * heads, .n_kv_heads = 2}));
  }
}

TEST_F(PromptAttentionTest, Windows) {
  for (const std::int64_t window : {1, 2, 31, 64, 65, 100, 1000}) {
    expect_attention(prompt(0, 150, {.n_heads = 2, .window = window}));
    expect_attention(
        prompt(30, 110, {.n_heads = 1, .n_kv_heads = 1, .head_dim = 256, .window = window}));
  }
}

TEST_F(PromptAttentionTest, SequencesInOneBatch) {
  // One after the other, the second beginning inside a block; a third with one token.
  AttentionCase c = prompt(0, 50);
  for (std::int32_t p = 0; p < 70; ++p) {
    c.slots.push_back(2);
    c.positions.push_back(p + 10);
  }
  c.slots.push_back(1);
  c.positions.push_back(79);
  c.capacity = 90;
  expect_attention(c);
  c.window = 20;
  expect_attention(c);
}

TEST_F(PromptAttentionTest, TokensInAnyOrder) {
  AttentionCase c;
  for (std::int32_t i = 0; i < 100; ++i) {
    c.slots.push_back(i % 3);
    c.positions.push_back(i / 3);
  }
  c.slots.erase(c.slots.begin());
  c.positions.erase(c.positions.begin());
  std::mt19937 random(1);
  std::vector<std::size_t> order(c.slots.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  AttentionCase mixed = c;
  for (std::size_t i = 0; i < order.size(); ++i) {
    mixed.slots[i] = c.slots[order[i]];
    mixed.positions[i] = c.positions[order[i]];
  }
  expect_attention(mixed);
}

// Scores far apart, larger ones later: what was seen before must shrink to nothing.
TEST_F(PromptAttentionTest, LargeScores) { expect_attention(prompt(0, 140, {.scale = 3})); }

TEST_F(PromptAttentionTest, NoTokens) { expect_attention({.slots = {}, .positions = {}}); }

TEST_F(PromptAttentionTest, NamesTheShapes) {
  const DeviceMatrix q(1, 128), k(1, 64);
  const PagedKv cache{nullptr, 1, 0, 0, 2, 32};
  const auto expect_thrown = [&](Matrix in, const PagedKv& of, int n_heads, Matrix out) {
    EXPECT_THROW(prompt_attention(in, {}, of, {n_heads, 1, 0, 8}, out, stream), ShapeError);
  };
  expect_thrown(q.view(), cache, 3, q.view());
  expect_thrown(k.view(), cache, 4, q.view());
  expect_thrown(q.view(), cache, 4, k.view());
  expect_thrown({q.view().data + 1, 1, 128}, cache, 4, q.view());
  expect_thrown(q.view(), {nullptr, 1, 0, 0, 2, 2}, 64, q.view());
}

}  // namespace
}  // namespace moesaic::cuda
