#include "kernels/panels.h"

#include <algorithm>

#include "kernels/base/error.h"
#include "kernels/base/huge_buffer.h"
#include "kernels/linear.h"
#include "kernels/packing.h"
#include "kernels/quant.h"
#include "kernels/rms_norm.h"
#include "tests/kernels/packed.h"
#include "tests/kernels/support.h"
#include "tests/reference/linear.h"

namespace moesaic::kernels {
namespace {

constexpr DType kFormats[] = {DType::BF16, DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1,
                              DType::Q8_0, DType::Q4_K, DType::Q5_K, DType::Q6_K};

/// Random weights with panels.
struct Panelled {
  Panelled(DType dtype, std::int64_t rows, std::int64_t cols, unsigned seed)
      : packed(dtype, rows, cols, seed), view(packed.view()) {
    ThreadPool pool(2);
    Pieces count(nullptr);
    pack_matrix(view, pool, count);
    buffer = HugeBuffer(count.used());
    Pieces pieces(buffer.data());
    pack_matrix(view, pool, pieces);
  }
  Packed packed;
  HugeBuffer buffer;
  WeightView view;
};

/// What rounding x to 15 bits and a sign per 32 columns may change in row r's product with token t.
double rounding_bound(const WeightView& w, const float* x, std::int64_t r) {
  std::vector<float> row(size(w.cols));
  dequantize_row(w.dtype, w.row(r), row);
  double bound = 0;
  for (std::int64_t c = 0; c < w.cols; c += 32) {
    double largest = 0, weights = 0;
    for (std::int64_t i = c; i < c + 32; ++i) {
      largest = std::max(largest, std::fabs(double{x[i]}));
      weights += std::fabs(double{row[size(i)]});
    }
    bound += 0.5001 * largest / (127 * 128) * weights;
  }
  return bound;
}

class Panels : public OnEachTarget {
 protected:
  Panels() { lender.ctx.activations = Activations::Q16; }
  std::vector<float> multiply(const WeightView& w, const std::vector<float>& x, Lender& with) {
    const std::int64_t n = static_cast<std::int64_t>(x.size()) / w.cols;
    std::vector<float> y(size(n * w.rows));
    linear(with.ctx, w, ConstMatrix(x.data(), n, w.cols), Matrix(y.data(), n, w.rows),
           Traffic::Mlp);
    return y;
  }
  Lender lender{2};
};
INSTANTIATE_TEST_SUITE_P(Targets, Panels, every_target(), target_name);

TEST_P(Panels, EveryFormatAndBatchEqualsReference) {
  for (const DType dtype : kFormats) {
    for (const std::int64_t cols : {traits(dtype).block_elems == 256 ? 768 : 96, 512}) {
      const Panelled w(dtype, 37, cols, 1);
      for (const std::int64_t n_tokens : {1, 2, 3, 4, 5, 6, 7, 8, 9, 21}) {
        SCOPED_TRACE(testing::Message() << traits(dtype).name << " tokens " << n_tokens);
        std::vector<float> x = normal_values(size(n_tokens * cols), 2);
        const std::vector<float> y = multiply(w.view, x, lender);
        if (dtype == DType::BF16) {
          for (float& v : x) v = bf16_to_f32(f32_to_bf16(v));
        }
        const ConstMatrix rows(x.data(), n_tokens, cols);
        const reference::Product expected = reference::linear(w.packed.view(), rows);
        for (std::int64_t t = 0; t < n_tokens; ++t) {
          for (std::int64_t r = 0; r < 37; ++r) {
            const std::size_t i = size(t * 37 + r);
            const double rounding =
                dtype == DType::BF16 ? 0 : rounding_bound(w.packed.view(), rows.row(t), r);
            ASSERT_NEAR(y[i], expected.value[i], rounding + 32 * kEps * expected.magnitude[i])
                << "token " << t << " row " << r;
          }
        }
      }
    }
  }
}

// The largest code of every format against the largest digits: no sum overflows, no pair saturates.
TEST_P(Panels, ExtremeCodes) {
  for (const DType dtype : {DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q8_0}) {
    for (const float sign : {1.0f, -1.0f}) {
      std::vector<float> values(64, sign);
      values[1] = -sign;
      std::vector<std::byte> bytes(static_cast<std::size_t>(row_bytes(dtype, 64)));
      quantize_row(dtype, values, bytes.data());
      WeightView w{bytes.data(), dtype, 1, 64};
      Pieces count(nullptr);
      pack_matrix(w, lender.pool, count);
      HugeBuffer buffer(count.used());
      Pieces pieces(buffer.data());
      pack_matrix(w, lender.pool, pieces);
      std::vector<float> row(64);
      dequantize_row(dtype, bytes.data(), row);
      for (const float x_sign : {1.0f, -1.0f}) {
        std::vector<float> x(64);
        double expected = 0;
        for (std::size_t i = 0; i < 64; ++i) {
          x[i] = x_sign * (row[i] < 0 ? -3.0f : 3.0f);
          expected += double{row[i]} * x[i];
        }
        EXPECT_NEAR(multiply(w, x, lender)[0], expected, 1e-4 * std::fabs(expected))
            << traits(dtype).name;
      }
    }
  }
}

TEST_P(Panels, TokenDependsOnNeitherBatchNorThreads) {
  for (const DType dtype : {DType::Q4_1, DType::Q6_K, DType::BF16}) {
    const Panelled w(dtype, 53, 512, 1);
    const std::vector<float> x = normal_values(19 * 512, 2);
    const std::vector<float> together = multiply(w.view, x, lender);
    Lender single(1), four(4);
    single.ctx.activations = four.ctx.activations = Activations::Q16;
    EXPECT_EQ(multiply(w.view, x, single), together);
    EXPECT_EQ(multiply(w.view, x, four), together);
    for (std::size_t t = 0; t < 19; ++t) {
      const std::vector<float> alone(x.begin() + static_cast<std::ptrdiff_t>(512 * t),
                                     x.begin() + static_cast<std::ptrdiff_t>(512 * (t + 1)));
      const std::vector<float> y = multiply(w.view, alone, lender);
      EXPECT_TRUE(
          std::equal(y.begin(), y.end(), together.begin() + static_cast<std::ptrdiff_t>(53 * t)));
    }
  }
}

TEST_P(Panels, ZerosAndTinyInputs) {
  const Panelled w(DType::Q8_0, 16, 64, 1);
  for (const float value : {0.0f, -0.0f, 1e-40f, 1e-36f}) {
    for (const float y : multiply(w.view, std::vector<float>(64, value), lender)) {
      EXPECT_NEAR(y, 0, 1e-33) << value;
    }
  }
}

TEST_P(Panels, WhatIsNotFiniteStaysInItsToken) {
  for (const DType dtype : kFormats) {
    const std::int64_t cols = 512;
    const Panelled w(dtype, 17, cols, 1);
    for (const float bad : {kNan, kInf, -kInf}) {
      std::vector<float> x = normal_values(size(3 * cols), 2);
      x[size(cols + 40)] = bad;
      const std::vector<float> y = multiply(w.view, x, lender);
      for (std::size_t i = 0; i < y.size(); ++i) {
        EXPECT_EQ(std::isfinite(y[i]), i / 17 != 1) << traits(dtype).name << " element " << i;
      }
    }
  }
}

TEST_P(Panels, GroupEqualsItsParts) {
  const Panelled a(DType::Q4_1, 40, 96, 1), b(DType::BF16, 7, 96, 2), c(DType::Q8_0, 100, 96, 3);
  const std::vector<float> norm = normal_values(96, 4);
  for (const std::int64_t n_tokens : {1, 3, 70}) {
    const std::vector<float> x = normal_values(size(n_tokens * 96), 5);
    const ConstMatrix rows(x.data(), n_tokens, 96);
    std::vector<float> normed(x.size());
    rms_norm(lender.ctx, rows, norm, 1e-5f, Matrix(normed.data(), n_tokens, 96));
    std::vector<std::vector<float>> y, expected;
    std::vector<LinearOutput> outputs;
    for (const Panelled* w : {&a, &b, &c}) {
      expected.push_back(multiply(w->view, normed, lender));
      y.emplace_back(expected.back().size(), 0.5f);
    }
    for (std::size_t i = 0; i < 3; ++i) {
      const WeightView& w = (i == 0 ? a : i == 1 ? b : c).view;
      outputs.push_back({w, Matrix(y[i].data(), n_tokens, w.rows), i == 2});
      for (float& e : expected[2]) e += i == 2 ? 0.5f : 0.0f;
    }
    lender.tally.reset();
    linear_group(lender.ctx, {rows, norm, 1e-5f}, outputs, Traffic::Attention);
    EXPECT_EQ(y, expected);
    EXPECT_EQ(lender.tally.total(),
              panel_bytes(a.view) + panel_bytes(b.view) + panel_bytes(c.view));
  }
}

TEST_P(Panels, GatedEqualsItsParts) {
  const Panelled gate(DType::Q4_1, 40, 96, 1), up(DType::Q4_1, 40, 96, 2);
  for (const std::int64_t n_tokens : {0, 1, 3, 70}) {
    const std::vector<float> x = normal_values(size(n_tokens * 96), 5);
    std::vector<float> h(size(n_tokens * 40));
    gated_linear(lender.ctx, {.x = ConstMatrix(x.data(), n_tokens, 96)}, Activation::Silu,
                 gate.view, up.view, Matrix(h.data(), n_tokens, 40), Traffic::Mlp);
    std::vector<float> g = multiply(gate.view, x, lender);
    const std::vector<float> u = multiply(up.view, x, lender);
    gated_activation(lender.ctx, Activation::Silu, ConstMatrix(g.data(), n_tokens, 40),
                     ConstMatrix(u.data(), n_tokens, 40), Matrix(g.data(), n_tokens, 40));
    ASSERT_EQ(h.size(), g.size());
    for (std::size_t i = 0; i < h.size(); ++i) {
      EXPECT_NEAR(h[i], g[i], 4 * kEps * std::fabs(g[i]));
    }
  }
}

// The hint changes nothing, whatever comes after it: other weights, ones without panels, none.
TEST_P(Panels, ReadAheadChangesNothing) {
  const Panelled a(DType::Q8_0, 40, 96, 1), b(DType::Q4_1, 5, 96, 2);
  const std::vector<float> x = normal_values(96, 5);
  const std::vector<float> expected = multiply(a.view, x, lender);
  for (const Upcoming& upcoming :
       {Upcoming{}, Upcoming{.weights = {a.view}}, Upcoming{.weights = {b.view, a.view}},
        Upcoming{.weights = {a.view, a.view}, .gated = true},
        Upcoming{.weights = {b.packed.view()}}}) {
    read_ahead(lender.ctx, upcoming);
    EXPECT_EQ(multiply(a.view, x, lender), expected);
  }
}

// Without panels, or with other activations, the file's rows are read.
TEST_P(Panels, OnlyForQ16) {
  const Panelled w(DType::Q4_1, 20, 64, 1);
  const std::vector<float> x = normal_values(64, 2);
  Lender exact(2);
  const std::vector<float> expected = multiply(w.packed.view(), x, exact);
  EXPECT_EQ(multiply(w.view, x, exact), expected);
  EXPECT_EQ(multiply(w.packed.view(), x, lender), expected);
}

TEST(PanelsShape, NormMustFit) {
  const Panelled w(DType::Q8_0, 16, 8192, 1);
  Lender lender(2);
  lender.ctx.activations = Activations::Q16;
  const std::vector<float> x(8192, 1.0f), norm(32, 1.0f);
  std::vector<float> y(16);
  const LinearOutput output{w.view, Matrix(y.data(), 1, 16)};
  EXPECT_THROW(linear_group(lender.ctx, {ConstMatrix(x.data(), 1, 8192), norm, 1e-5f}, {&output, 1},
                            Traffic::Mlp),
               ShapeError);
}

TEST(PanelsShape, FormatsAndLengths) {
  EXPECT_FALSE(has_panels(DType::F32, 64));
  EXPECT_FALSE(has_panels(DType::F16, 64));
  EXPECT_FALSE(has_panels(DType::BF16, 48));
  EXPECT_FALSE(has_panels(DType::Q8_0, 0));
  EXPECT_FALSE(has_panels(DType::Q4_K, 128));
  for (const DType dtype : kFormats) {
    EXPECT_TRUE(has_panels(dtype, 768));
    // Nearly the file's bytes: an overhead of 3 % at most, the size of Q4_K's unpacked scales.
    const WeightView w{nullptr, dtype, 64, 768};
    EXPECT_GE(panel_bytes(w), w.bytes()) << traits(dtype).name;
    EXPECT_LE(panel_bytes(w), 103 * w.bytes() / 100) << traits(dtype).name;
  }
}

TEST(HugeBuffer, HoldsWhatItSays) {
  EXPECT_EQ(HugeBuffer().data(), nullptr);
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{5} << 20}) {
    HugeBuffer buffer(bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.data()) % (std::size_t{2} << 20), 0u);
    EXPECT_EQ(buffer.data()[bytes - 1], std::byte{0});
    buffer.data()[bytes - 1] = std::byte{1};
    HugeBuffer moved = std::move(buffer);
    EXPECT_EQ(moved.size(), bytes);
    EXPECT_EQ(moved.data()[bytes - 1], std::byte{1});
  }
}

}  // namespace
}  // namespace moesaic::kernels
