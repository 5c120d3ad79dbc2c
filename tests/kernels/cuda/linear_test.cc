#include "kernels/cuda/linear.h"

#include "kernels/base/error.h"
#include "tests/kernels/cuda/device.h"
#include "tests/kernels/packed.h"
#include "tests/kernels/support.h"
#include "tests/reference/linear.h"

namespace moesaic::cuda {
namespace {

class Linear : public OnDevice {
 protected:
  // Y = X Wᵀ (+ b) (+ Y) of random operands, against the reference. The sum of a lane and the tree
  // over lanes together round at most once per 8 columns and 5 times.
  void expect_product(DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t n_tokens,
                      bool bias = false, bool accumulate = false) {
    const Packed w(dtype, rows, cols, static_cast<unsigned>(rows + cols));
    const auto x = normal_values(size(n_tokens * cols), 2), b = normal_values(size(rows), 3);
    const auto before = normal_values(size(n_tokens * rows), 4);
    const auto expected = reference::linear(w.view(), {x.data(), n_tokens, cols});
    const DeviceWeights weights(w.view(), stream);
    const auto device_b = on_device(b, stream);
    const DeviceMatrix in(x, n_tokens, cols, stream);
    const DeviceMatrix out =
        accumulate ? DeviceMatrix(before, n_tokens, rows, stream) : DeviceMatrix(n_tokens, rows);
    linear({weights.view(), in.view(), bias ? device_b.data() : nullptr, out.view(), accumulate},
           stream);
    const auto y = out.host(stream);
    for (std::size_t i = 0; i < y.size(); ++i) {
      const double more = (bias ? b[i % size(rows)] : 0.0) + (accumulate ? before[i] : 0.0);
      const double tolerance =
          (static_cast<double>(cols) / 32 + 8) * kEps *
          (expected.magnitude[i] + (bias ? std::fabs(b[i % size(rows)]) : 0.0) + std::fabs(more));
      ASSERT_NEAR(y[i], expected.value[i] + more, tolerance)
          << traits(dtype).name << " [" << rows << ", " << cols << "], element " << i;
    }
  }
};

TEST_F(Linear, EveryDType) {
  for (const DTypeTraits& t : kDTypes) {
    const std::int64_t block = std::max<std::int64_t>(t.block_elems, 32);
    expect_product(t.dtype, 7, block, 1);
    expect_product(t.dtype, 5, 3 * block, 2);
    expect_product(t.dtype, 3, 9 * std::int64_t{256}, 1);  // three chunks, the last one short
  }
}

TEST_F(Linear, NumbersOfTokens) {
  for (const std::int64_t n : {0, 1, 2, 3, 5, 7, 8, 9, 15}) {
    expect_product(DType::Q4_1, 6, 576, n);
    expect_product(DType::BF16, 2, 64, n);
  }
}

TEST_F(Linear, OddShapes) {
  for (const std::int64_t cols : {1, 3, 33, 255, 1025}) {
    expect_product(DType::BF16, 3, cols, 2);
    expect_product(DType::F32, 1, cols, 3);
  }
  expect_product(DType::Q8_0, 0, 64, 1);
  expect_product(DType::Q8_0, 33, 32, 1);
}

TEST_F(Linear, BiasAndAccumulate) {
  expect_product(DType::Q8_0, 9, 96, 2, true, false);
  expect_product(DType::Q8_0, 9, 96, 2, false, true);
  expect_product(DType::Q6_K, 9, 256, 3, true, true);
}

TEST_F(Linear, GroupOfSeveralDTypesEqualsOneByOne) {
  const Packed q(DType::Q4_K, 10, 256, 1), k(DType::Q4_K, 5, 256, 2), v(DType::Q6_K, 5, 256, 3),
      none(DType::Q4_K, 0, 256, 4);
  const DeviceMatrix x(normal_values(2 * 256, 5), 2, 256, stream);
  std::vector<DeviceWeights> weights;
  std::vector<DeviceMatrix> together, alone;
  std::vector<DeviceBuffer<float>> biases;
  std::vector<Product> products;
  for (const Packed* w : {&q, &v, &none, &k}) {
    weights.emplace_back(w->view(), stream);
    together.emplace_back(2, w->view().rows);
    alone.emplace_back(2, w->view().rows);
    biases.push_back(on_device(normal_values(size(w->view().rows), 6), stream));
    products.push_back(
        {weights.back().view(), x.view(), biases.back().data(), together.back().view()});
    Product one = products.back();
    one.y = alone.back().view();
    linear(one, stream);
  }
  linear(products, stream);
  for (std::size_t i = 0; i < products.size(); ++i) {
    EXPECT_EQ(together[i].host(stream), alone[i].host(stream)) << i;
  }
}

TEST_F(Linear, NanInOneTokenStaysThere) {
  const Packed w(DType::Q4_0, 4, 64, 1);
  std::vector<float> x = normal_values(3 * 64, 2);
  x[64 + 17] = kNan;
  const DeviceWeights weights(w.view(), stream);
  const DeviceMatrix in(x, 3, 64, stream), out(3, 4);
  linear({weights.view(), in.view(), nullptr, out.view()}, stream);
  const auto y = out.host(stream);
  for (std::size_t i = 0; i < y.size(); ++i) EXPECT_EQ(std::isnan(y[i]), i / 4 == 1);
}

TEST_F(Linear, NamesTheShapes) {
  const DeviceMatrix x(2, 64), y(2, 5);
  const DeviceWeights w(Packed(DType::F32, 5, 64, 1).view(), stream);
  const auto wrong = [&](WeightView view, Matrix in, Matrix out) {
    EXPECT_THROW(linear({view, in, nullptr, out}, stream), ShapeError);
  };
  wrong(w.view(), x.view(), x.view());
  wrong(w.view(), y.view(), y.view());
  wrong(w.view(), {x.view().data + 1, 2, 64}, y.view());
  wrong({w.view().data + 4, DType::F32, 5, 64}, x.view(), y.view());
}

}  // namespace
}  // namespace moesaic::cuda
