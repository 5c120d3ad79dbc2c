#include "kernels/base/error.h"
#include "kernels/linear.h"
#include "kernels/quant.h"
#include "tests/kernels/support.h"
#include "tests/reference/linear.h"

namespace moesaic::kernels {
namespace {

struct Case {
  std::int64_t m, n, k;
};

std::vector<float> rounded(const std::vector<float>& v) {
  std::vector<float> r;
  for (const float x : v) r.push_back(bf16_to_f32(f32_to_bf16(x)));
  return r;
}

void expect_gemm(Activations activations, int n_threads, Case shape, bool trans_a, bool trans_b,
                 float alpha, float beta) {
  const auto [m, n, k] = shape;
  SCOPED_TRACE(testing::Message() << "m " << m << " n " << n << " k " << k << " trans_a " << trans_a
                                  << " trans_b " << trans_b << " alpha " << alpha << " beta "
                                  << beta << " threads " << n_threads);
  // Rows two and three elements longer than the matrix: strides count.
  const std::int64_t lda = (trans_a ? m : k) + 2;
  const std::int64_t ldb = (trans_b ? k : n) + 3;
  const std::vector<float> a = normal_values(size((trans_a ? k : m) * lda), 1);
  const std::vector<float> b = normal_values(size((trans_b ? n : k) * ldb), 2);
  // With beta 0, what C held does not matter.
  std::vector<float> c =
      beta == 0 ? std::vector<float>(size(m * n), kNan) : normal_values(size(m * n), 3);
  const bool bf16 = activations == Activations::BF16;
  const std::vector<float> exact_a = bf16 ? rounded(a) : a;
  const std::vector<float> exact_b = bf16 ? rounded(b) : b;
  const auto view_a = [&](const std::vector<float>& v) {
    return ConstMatrix(v.data(), trans_a ? k : m, trans_a ? m : k, lda);
  };
  const auto view_b = [&](const std::vector<float>& v) {
    return ConstMatrix(v.data(), trans_b ? n : k, trans_b ? k : n, ldb);
  };
  const reference::Product expected = reference::gemm(
      trans_a, trans_b, alpha, view_a(exact_a), view_b(exact_b), beta, ConstMatrix(c.data(), m, n));
  Lender lender(n_threads);
  lender.ctx.activations = activations;
  gemm(lender.ctx, trans_a, trans_b, alpha, view_a(a), view_b(b), beta, Matrix(c.data(), m, n));
  for (std::size_t i = 0; i < c.size(); ++i) {
    const double bound =
        kEps * (8 + std::sqrt(static_cast<double>(k))) * expected.magnitude[i] + 1e-30;
    ASSERT_NEAR(expected.value[i], c[i], bound) << "element " << i;
  }
}

TEST(Gemm, TransposesAndScalesEqualReference) {
  for (const Activations activations : {Activations::F32, Activations::BF16}) {
    for (const Case shape : {Case{1, 1, 1}, Case{17, 5, 33}, Case{5, 40, 64}, Case{64, 64, 100}}) {
      for (const bool trans_a : {false, true}) {
        for (const bool trans_b : {false, true}) {
          expect_gemm(activations, 2, shape, trans_a, trans_b, 1, 0);
          expect_gemm(activations, 2, shape, trans_a, trans_b, 1, 1);
          expect_gemm(activations, 2, shape, trans_a, trans_b, -0.5f, 0.25f);
        }
      }
    }
  }
}

TEST(Gemm, ThreadCounts) {
  for (const int n_threads : {1, 3, 4}) {
    expect_gemm(Activations::F32, n_threads, {50, 20, 30}, false, true, 1, 0);
    expect_gemm(Activations::F32, n_threads, {20, 50, 30}, true, false, 2, 1);
  }
}

TEST(Gemm, NoTermsScaleC) {
  for (const Activations activations : {Activations::F32, Activations::BF16}) {
    expect_gemm(activations, 2, {3, 4, 0}, false, false, 1, 0);
    expect_gemm(activations, 2, {3, 4, 0}, false, false, 1, 0.5f);
  }
}

TEST(Gemm, EmptyC) {
  expect_gemm(Activations::F32, 2, {0, 4, 3}, false, false, 1, 0);
  expect_gemm(Activations::BF16, 2, {4, 0, 3}, true, false, 1, 1);
}

TEST(Gemm, RepeatsBitForBit) {
  const std::vector<float> a = normal_values(100 * 70, 1);
  const std::vector<float> b = normal_values(70 * 60, 2);
  Lender lender(2);
  std::vector<float> first(100 * 60);
  std::vector<float> second(100 * 60);
  for (std::vector<float>* c : {&first, &second}) {
    gemm(lender.ctx, false, false, 1, ConstMatrix(a.data(), 100, 70), ConstMatrix(b.data(), 70, 60),
         0, Matrix(c->data(), 100, 60));
  }
  EXPECT_EQ(first, second);
}

TEST(Gemm, MismatchNamesShapes) {
  std::vector<float> v(64);
  Lender lender;
  try {
    gemm(lender.ctx, false, false, 1, ConstMatrix(v.data(), 2, 3), ConstMatrix(v.data(), 4, 5), 0,
         Matrix(v.data(), 2, 5));
    FAIL() << "no error";
  } catch (const ShapeError& e) {
    EXPECT_STREQ(e.what(), "gemm: op(A) [2, 3] by op(B) [4, 5] into C [2, 5], expected C [2, 5]");
  }
}

// Operands that are bfloat16 already give what the same values in float32 give under
// Activations::BF16.
TEST(Gemm, RawBfloat16EqualsRoundedFloats) {
  for (const bool trans_a : {false, true}) {
    for (const bool trans_b : {false, true}) {
      const std::vector<float> a = normal_values(40 * 24, 1);
      const std::vector<float> b = normal_values(40 * 24, 2);
      std::vector<std::uint16_t> a_bits(a.size());
      std::vector<std::uint16_t> b_bits(b.size());
      to_bf16(a, a_bits);
      to_bf16(b, b_bits);
      // A [40, 24] or [24, 40] by B, so that op(A) is [24, 40] where transposed.
      const std::int64_t rows = trans_a ? 40 : 24;
      const std::int64_t b_rows = trans_b ? 24 : 40;
      Lender lender(2);
      lender.ctx.activations = Activations::BF16;
      std::vector<float> expected(24 * 24, 0.5f);
      std::vector<float> found = expected;
      gemm(lender.ctx, trans_a, trans_b, 1, ConstMatrix(a.data(), rows, 64 - rows),
           ConstMatrix(b.data(), b_rows, 64 - b_rows), 1, Matrix(expected.data(), 24, 24));
      using Bits = MatrixView<const std::uint16_t>;
      gemm(lender.ctx, trans_a, trans_b, 1, Bits(a_bits.data(), rows, 64 - rows),
           Bits(b_bits.data(), b_rows, 64 - b_rows), 1, Matrix(found.data(), 24, 24));
      EXPECT_EQ(found, expected);
    }
  }
}

TEST(Gemm, OnThisThreadEqualsOnAll) {
  const std::vector<float> a = normal_values(33 * 20, 1);
  const std::vector<float> b = normal_values(20 * 7, 2);
  std::vector<float> expected(33 * 7, 2.0f);
  std::vector<float> found = expected;
  Lender lender(1);
  gemm(lender.ctx, false, false, 1, ConstMatrix(a.data(), 33, 20), ConstMatrix(b.data(), 20, 7), 1,
       Matrix(expected.data(), 33, 7));
  gemm_on_this_thread(false, false, 1, ConstMatrix(a.data(), 33, 20), ConstMatrix(b.data(), 20, 7),
                      1, Matrix(found.data(), 33, 7));
  EXPECT_EQ(found, expected);
  EXPECT_THROW(gemm_on_this_thread(false, false, 1, ConstMatrix(a.data(), 33, 20),
                                   ConstMatrix(b.data(), 7, 20), 1, Matrix(found.data(), 33, 7)),
               ShapeError);
}

}  // namespace
}  // namespace moesaic::kernels
