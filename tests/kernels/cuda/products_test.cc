// Products of host matrices on a GPU against the host's own.

#include "kernels/cuda/base/products.h"

#include <algorithm>

#include "kernels/linear.h"
#include "tests/kernels/cuda/device.h"
#include "tests/kernels/support.h"

namespace moesaic::cuda {
namespace {

// Hands on, and counts.
class Counting : public kernels::Products {
 public:
  explicit Counting(std::unique_ptr<kernels::Products> to) : to_(std::move(to)) {}
  bool takes(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t bytes) const override {
    return to_->takes(m, n, k, bytes);
  }
  void multiply(Context& ctx, bool trans_a, bool trans_b, float alpha, ConstMatrix a, ConstMatrix b,
                float beta, Matrix c) override {
    ++n_f32;
    to_->multiply(ctx, trans_a, trans_b, alpha, a, b, beta, c);
  }
  void multiply(Context& ctx, bool trans_a, bool trans_b, float alpha,
                MatrixView<const std::uint16_t> a, MatrixView<const std::uint16_t> b, float beta,
                Matrix c) override {
    ++n_bf16;
    to_->multiply(ctx, trans_a, trans_b, alpha, a, b, beta, c);
  }
  int n_f32 = 0, n_bf16 = 0;

 private:
  std::unique_ptr<kernels::Products> to_;
};

class CudaProducts : public OnDevice {
 protected:
  Lender lender{2};
};

// In pieces of 16: single ones, whole ones, rests; rows with gaps; what C held, NaN where it does
// not count.
TEST_F(CudaProducts, EqualTheHosts) {
  Counting products(make_products(0, {.block = 16, .least = 0}));
  struct Shape {
    std::int64_t m, n, k;
  };
  int n = 0;
  for (const Shape& s : {Shape{1, 1, 1}, {16, 16, 16}, {5, 40, 17}, {33, 7, 48}, {20, 35, 50}}) {
    for (int way = 0; way < 4; ++way) {
      const bool trans_a = way % 2 == 1, trans_b = way / 2 == 1;
      SCOPED_TRACE(testing::Message() << s.m << " " << s.n << " " << s.k << " way " << way);
      const std::int64_t gap = way;  // behind each row
      const auto a = normal_values(size((s.m + gap) * (s.k + gap)), 1);
      const auto b = normal_values(size((s.n + gap) * (s.k + gap)), 2);
      const auto matrix = [&](const std::vector<float>& v, std::int64_t rows, std::int64_t cols) {
        return ConstMatrix(v.data(), rows, cols, cols + gap);
      };
      const ConstMatrix ma = trans_a ? matrix(a, s.k, s.m) : matrix(a, s.m, s.k);
      const ConstMatrix mb = trans_b ? matrix(b, s.n, s.k) : matrix(b, s.k, s.n);
      for (const auto& [alpha, beta] : {std::pair{1.0F, 0.0F}, {-1.0F, 1.0F}, {2.0F, 0.5F}}) {
        for (const Activations precision : {Activations::F32, Activations::BF16}) {
          auto expected = beta == 0 ? std::vector<float>(size(s.m * (s.n + gap)), kNan)
                                    : normal_values(size(s.m * (s.n + gap)), 3);
          auto found = expected;
          Context host = lender.ctx.with(precision), device = host;
          device.products = &products;
          kernels::gemm(host, trans_a, trans_b, alpha, ma, mb, beta,
                        {expected.data(), s.m, s.n, s.n + gap});
          kernels::gemm(device, trans_a, trans_b, alpha, ma, mb, beta,
                        {found.data(), s.m, s.n, s.n + gap});
          ++n;
          for (std::size_t i = 0; i < found.size(); ++i) {
            if (std::isnan(expected[i])) {  // in a gap, which nobody writes
              EXPECT_TRUE(std::isnan(found[i]));
              continue;
            }
            EXPECT_NEAR(found[i], expected[i], 8 * kEps * static_cast<double>(s.k) * 4);
          }
        }
      }
    }
  }
  EXPECT_EQ(products.n_f32, n / 2);
  EXPECT_EQ(products.n_bf16, n / 2);
}

TEST_F(CudaProducts, SmallAndEmptyOnesStay) {
  Counting products(make_products(0));
  EXPECT_TRUE(products.takes(2048, 1536, 576, 4));
  EXPECT_TRUE(products.takes(2048, 1536, 576, 2));
  EXPECT_FALSE(products.takes(2048, 64, 576, 4));  // a router's
  EXPECT_FALSE(products.takes(128, 128, 128, 4));
  EXPECT_FALSE(products.takes(1 << 20, 1 << 20, 0, 4));
  Context ctx = lender.ctx.with(Activations::F32);
  ctx.products = &products;
  const auto a = normal_values(64, 1);
  std::vector<float> c(64, kNan);
  kernels::gemm(ctx, false, true, 1, {a.data(), 8, 8}, {a.data(), 8, 8}, 0, {c.data(), 8, 8});
  EXPECT_TRUE(std::none_of(c.begin(), c.end(), [](float v) { return std::isnan(v); }));
  EXPECT_EQ(products.n_f32, 0);
}

// Read by steps.cmake: nothing is allocated for a product.
class CudaProductsSteps : public CudaProducts {
 protected:
  void run(int n) {
    const auto products = make_products(0, {.block = 16, .least = 0});
    Context ctx = lender.ctx.with(Activations::F32);
    ctx.products = products.get();
    const auto a = normal_values(16 * 16, 1);
    std::vector<float> c(a.size());
    for (int i = 0; i < n; ++i) {
      kernels::gemm(ctx, false, true, 1, {a.data(), 16, 16}, {a.data(), 16, 16}, 0,
                    {c.data(), 16, 16});
    }
  }
};
TEST_F(CudaProductsSteps, Ten) { run(10); }
TEST_F(CudaProductsSteps, Thirty) { run(30); }

}  // namespace
}  // namespace moesaic::cuda
