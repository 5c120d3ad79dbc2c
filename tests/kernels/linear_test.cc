#include "kernels/linear.h"

#include "kernels/base/error.h"
#include "kernels/quant.h"
#include "tests/kernels/packed.h"
#include "tests/kernels/support.h"
#include "tests/reference/linear.h"

namespace moesaic::kernels {
namespace {

class Linear : public OnEachTarget {};
INSTANTIATE_TEST_SUITE_P(Targets, Linear, every_target(), target_name);

// Errors of a float32 sum of n products: at most n ε Σ|w x|, and about √n of that when they do not
// conspire.
double sum_bound(std::int64_t n, double magnitude) {
  return kEps * (8 + std::sqrt(static_cast<double>(n))) * magnitude;
}

void expect_close(const reference::Product& expected, const std::vector<float>& y,
                  std::int64_t cols, double weight_error = 0) {
  ASSERT_EQ(expected.value.size(), y.size());
  for (std::size_t i = 0; i < y.size(); ++i) {
    ASSERT_NEAR(expected.value[i], y[i],
                sum_bound(cols, expected.magnitude[i]) + weight_error * expected.magnitude[i])
        << "element " << i;
  }
}

TEST_P(Linear, EveryFormatAndBatchEqualsReference) {
  for (const DTypeTraits& t : kDTypes) {
    const std::int64_t cols = t.block_elems == 1 ? 83 : 3 * t.block_elems;
    const Packed w(t.dtype, 37, cols, 1);
    for (const std::int64_t n_tokens : {1, 2, 3, 4, 5, 12, 13, 40}) {
      SCOPED_TRACE(std::string(t.name) + ", tokens " + std::to_string(n_tokens));
      const std::vector<float> x = normal_values(size(n_tokens * cols), 2);
      std::vector<float> y(size(n_tokens * 37));
      Lender lender(2);
      linear(lender.ctx, w.view(), ConstMatrix(x.data(), n_tokens, cols),
             Matrix(y.data(), n_tokens, 37), Traffic::Mlp);
      expect_close(reference::linear(w.view(), ConstMatrix(x.data(), n_tokens, cols)), y, cols);
      EXPECT_EQ(lender.tally.bytes(Traffic::Mlp), w.view().bytes());
      EXPECT_EQ(lender.tally.total(), w.view().bytes());
    }
  }
}

// A unit vector picks a column: the weights that enter a product are dequantize_row's, bit for bit.
TEST_P(Linear, WeightsEnterExactly) {
  for (const DTypeTraits& t : kDTypes) {
    const std::int64_t cols = t.block_elems == 1 ? 45 : 2 * t.block_elems;
    const Packed w(t.dtype, 4, cols, 3);
    const std::vector<float> values = reference::unpack(w.view());
    Lender lender;
    for (std::int64_t c = 0; c < cols; ++c) {
      std::vector<float> x(size(cols), 0.0f);
      x[size(c)] = 1;
      float y[4];
      linear(lender.ctx, w.view(), ConstMatrix(x.data(), 1, cols), Matrix(y, 1, 4), Traffic::Mlp);
      for (std::int64_t r = 0; r < 4; ++r) {
        ASSERT_EQ(y[r], values[size(r * cols + c)]) << t.name << " row " << r << " column " << c;
      }
    }
  }
}

TEST_P(Linear, Bf16RoundsActivations) {
  for (const DTypeTraits& t : kDTypes) {
    const std::int64_t cols = t.block_elems == 1 ? 83 : 3 * t.block_elems;
    const Packed w(t.dtype, 37, cols, 1);
    for (const std::int64_t n_tokens : {1, 3, 40}) {
      SCOPED_TRACE(std::string(t.name) + ", tokens " + std::to_string(n_tokens));
      const std::vector<float> x = normal_values(size(n_tokens * cols), 2);
      std::vector<float> rounded(x.size());
      for (std::size_t i = 0; i < x.size(); ++i) rounded[i] = bf16_to_f32(f32_to_bf16(x[i]));
      std::vector<float> y(size(n_tokens * 37));
      Lender lender(2);
      lender.ctx.activations = Activations::BF16;
      linear(lender.ctx, w.view(), ConstMatrix(x.data(), n_tokens, cols),
             Matrix(y.data(), n_tokens, 37), Traffic::Mlp);
      // Weights are rounded too where a batch goes through unpacked tiles: half of bfloat16's 2⁻⁷.
      expect_close(reference::linear(w.view(), ConstMatrix(rounded.data(), n_tokens, cols)), y,
                   cols, n_tokens > 12 ? 0x1p-8 : 0);
    }
  }
}

TEST_P(Linear, TokenDoesNotDependOnSmallBatch) {
  const Packed w(DType::Q4_1, 19, 96, 1);
  const std::vector<float> x = normal_values(12 * 96, 2);
  std::vector<float> alone(12 * 19);
  std::vector<float> together(12 * 19);
  Lender lender(2);
  linear(lender.ctx, w.view(), ConstMatrix(x.data(), 12, 96), Matrix(together.data(), 12, 19),
         Traffic::Mlp);
  for (std::int64_t t = 0; t < 12; ++t) {
    linear(lender.ctx, w.view(), ConstMatrix(x.data() + t * 96, 1, 96),
           Matrix(alone.data() + t * 19, 1, 19), Traffic::Mlp);
  }
  EXPECT_EQ(alone, together);
}

TEST_P(Linear, AccumulatesIntoStridedRows) {
  const Packed w(DType::Q8_0, 21, 64, 1);
  for (const std::int64_t n_tokens : {1, 5, 33}) {
    const std::vector<float> x = normal_values(size(n_tokens * 70), 2);
    const std::vector<float> before = normal_values(size(n_tokens * 30), 3);
    std::vector<float> y = before;
    Lender lender(3);
    const ConstMatrix x_rows(x.data(), n_tokens, 64, 70);
    linear(lender.ctx, w.view(), x_rows, Matrix(y.data(), n_tokens, 21, 30), Traffic::Mlp, true);
    const reference::Product expected = reference::linear(w.view(), x_rows);
    for (std::int64_t t = 0; t < n_tokens; ++t) {
      for (std::int64_t r = 0; r < 30; ++r) {
        const double start = before[size(t * 30 + r)];
        const float found = y[size(t * 30 + r)];
        if (r >= 21) {
          ASSERT_EQ(found, before[size(t * 30 + r)]) << "beyond the row";
        } else {
          const std::size_t i = size(t * 21 + r);
          ASSERT_NEAR(found, start + expected.value[i],
                      sum_bound(64, expected.magnitude[i] + std::fabs(start)));
        }
      }
    }
  }
}

TEST_P(Linear, RepeatsBitForBit) {
  const Packed w(DType::Q4_1, 50, 320, 1);
  for (const int n_threads : {1, 2, 3, 4}) {
    for (const std::int64_t n_tokens : {1, 7, 40}) {
      const std::vector<float> x = normal_values(size(n_tokens * 320), 2);
      std::vector<float> first(size(n_tokens * 50));
      std::vector<float> second(size(n_tokens * 50));
      Lender lender(n_threads);
      for (std::vector<float>* y : {&first, &second}) {
        linear(lender.ctx, w.view(), ConstMatrix(x.data(), n_tokens, 320),
               Matrix(y->data(), n_tokens, 50), Traffic::Mlp);
      }
      EXPECT_EQ(first, second);
    }
  }
}

TEST_P(Linear, FewerRowsThanThreadsAndEmpty) {
  const Packed w(DType::F16, 1, 7, 1);
  const std::vector<float> x = normal_values(20 * 7, 2);
  for (const std::int64_t n_tokens : {0, 1, 20}) {
    std::vector<float> y(size(n_tokens));
    Lender lender(4);
    linear(lender.ctx, w.view(), ConstMatrix(x.data(), n_tokens, 7), Matrix(y.data(), n_tokens, 1),
           Traffic::Mlp);
    expect_close(reference::linear(w.view(), ConstMatrix(x.data(), n_tokens, 7)), y, 7);
  }
}

TEST(LinearShape, MismatchNamesBoth) {
  const Packed w(DType::F32, 3, 8, 1);
  std::vector<float> x(16);
  std::vector<float> y(16);
  Lender lender;
  try {
    linear(lender.ctx, w.view(), ConstMatrix(x.data(), 1, 9), Matrix(y.data(), 1, 3), Traffic::Mlp);
    FAIL() << "no error";
  } catch (const ShapeError& e) {
    EXPECT_STREQ(e.what(), "linear: X [1, 9] by W [3, 8] into Y [1, 3], expected Y [1, 3]");
  }
  EXPECT_THROW(linear(lender.ctx, {w.view().data, DType::Q4_1, 3, 8}, ConstMatrix(x.data(), 1, 8),
                      Matrix(y.data(), 1, 3), Traffic::Mlp),
               ShapeError);
}

TEST_P(Linear, RoundToBf16) {
  const std::vector<float> x = {0,      -0.0f, 1,     1.00390625f, 1.01171875f, -3.14159f,
                                1e-40f, kInf,  -kInf, kNan,        3.4e38f,     65504};
  std::vector<float> y(x.size());
  round_to_bf16(x, y);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const float expected = bf16_to_f32(f32_to_bf16(x[i]));
    if (std::isnan(x[i])) {
      EXPECT_TRUE(std::isnan(y[i]));
    } else {
      EXPECT_EQ(y[i], expected);
    }
  }
}

}  // namespace
}  // namespace moesaic::kernels
