#include "kernels/cuda/gemm.h"

#include "kernels/base/error.h"
#include "kernels/cuda/base/column_panels.h"
#include "kernels/linear.h"
#include "kernels/quant.h"
#include "tests/kernels/cuda/device.h"
#include "tests/kernels/packed.h"
#include "tests/kernels/support.h"
#include "tests/reference/linear.h"

namespace moesaic::cuda {
namespace {

class Gemm : public OnDevice {
 protected:
  // X Wᵀ with both rounded to bfloat16: products are exact in float32, sums of any order round at
  // most once a term.
  static reference::Product rounded(const WeightView& w, const std::vector<float>& x) {
    std::vector<std::uint16_t> bits(size(w.rows * w.cols));
    for (std::int64_t r = 0; r < w.rows; ++r) {
      kernels::dequantize_row_bf16(w.dtype, w.row(r),
                                   std::span(bits).subspan(size(r * w.cols), size(w.cols)));
    }
    std::vector<float> rounded_x(x.size());
    kernels::round_to_bf16(x, rounded_x);
    return reference::linear(
        {reinterpret_cast<const std::byte*>(bits.data()), DType::BF16, w.rows, w.cols},
        {rounded_x.data(), static_cast<std::int64_t>(x.size()) / w.cols, w.cols});
  }
  static void expect_equal(const std::vector<float>& y, const reference::Product& expected,
                           std::int64_t cols, const std::string& what) {
    ASSERT_EQ(y.size(), expected.value.size());
    for (std::size_t i = 0; i < y.size(); ++i) {
      ASSERT_NEAR(y[i], expected.value[i],
                  static_cast<double>(cols + 4) * kEps / 2 * expected.magnitude[i])
          << what << ", element " << i;
    }
  }
  // The workspace has room for X and `part_rows` rows of W, or for what gemm_workspace() says.
  void expect_product(DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t n_tokens,
                      std::int64_t part_rows = 0) {
    const Packed w(dtype, rows, cols, static_cast<unsigned>(rows + cols));
    const auto x = normal_values(size(n_tokens * cols), 2);
    const DeviceWeights weights(w.view(), stream);
    const DeviceMatrix in(x, n_tokens, cols, stream), out(n_tokens, rows);
    const DeviceBuffer<std::byte> workspace(
        gemm_workspace(n_tokens, cols, (part_rows > 0 ? part_rows : rows) * cols));
    gemm(blas, {weights.view(), in.view(), nullptr, out.view()},
         {workspace.data(), workspace.size()}, stream);
    expect_equal(out.host(stream), rounded(w.view(), x), cols,
                 fmt::format("{} [{}, {}], {} tokens", traits(dtype).name, rows, cols, n_tokens));
  }
  // The same with W in column panels and X rounded; room for `part_rows` rows of W.
  void expect_columns(DType dtype, std::int64_t rows, std::int64_t cols, std::int64_t n_tokens,
                      std::int64_t part_rows) {
    const Packed w(dtype, rows, cols, static_cast<unsigned>(rows + cols));
    const auto x = normal_values(size(n_tokens * cols), 2);
    std::vector<std::byte> packed(size(column_panels(w.view()).bytes()));
    pack_column_panels(w.view(), packed.data());
    const DeviceBuffer<std::byte> panels = on_device(packed, stream);
    const std::int64_t stride = bf16_stride(cols);
    std::vector<std::uint16_t> bits(size(n_tokens * stride));
    for (std::size_t t = 0; t < size(n_tokens); ++t) {
      for (std::size_t c = 0; c < size(cols); ++c) {
        bits[t * size(stride) + c] = kernels::f32_to_bf16(x[t * size(cols) + c]);
      }
    }
    const DeviceBuffer<std::uint16_t> in = on_device(bits, stream);
    const DeviceMatrix out(n_tokens, rows);
    const DeviceBuffer<std::byte> workspace(gemm_workspace(0, cols, part_rows * stride));
    WeightView view = w.view();
    view.data = nullptr;
    gemm(blas, {view, panels.data(), {in.data(), n_tokens, cols, stride}, out.view()},
         {workspace.data(), workspace.size()}, stream);
    expect_equal(
        out.host(stream), rounded(w.view(), x), cols,
        fmt::format("columns of {} [{}, {}], {} tokens", traits(dtype).name, rows, cols, n_tokens));
  }

  Blas blas{stream};
};

TEST_F(Gemm, EveryDType) {
  for (const DTypeTraits& t : kDTypes) {
    const std::int64_t block = std::max<std::int64_t>(t.block_elems, 32);
    expect_product(t.dtype, 7, block, 3);
    expect_product(t.dtype, 5, 3 * block, 1);
    expect_product(t.dtype, 40, 2 * std::int64_t{256},
                   2);  // several warps, the last one's run short
  }
}

TEST_F(Gemm, ManyTokens) {
  expect_product(DType::Q4_1, 33, 96, 70);
  expect_product(DType::F32, 3, 12, 300);
}

TEST_F(Gemm, OddShapes) {
  for (const std::int64_t cols : {1, 3, 33, 255, 1025}) {
    expect_product(DType::BF16, 3, cols, 2);
    expect_product(DType::F32, 1, cols, 3);
    expect_product(DType::F16, 9, cols, 1);
  }
  expect_product(DType::Q8_0, 0, 64, 2);
  expect_product(DType::Q8_0, 2, 64, 0);
}

TEST_F(Gemm, MatricesLargerThanTheWorkspaceComeInParts) {
  for (const std::int64_t part : {1, 4, 5, 9, 10}) {
    expect_product(DType::Q4_0, 10, 96, 5, part);
    expect_product(DType::Q6_K, 10, 256, 5, part);
  }
}

TEST_F(Gemm, EveryColumnFormat) {
  for (const DTypeTraits& t : kDTypes) {
    if (!has_column_panels(t.dtype)) continue;
    expect_columns(t.dtype, 7, 32, 3, 7);
    expect_columns(t.dtype, 64, 96, 1, 64);
    expect_columns(t.dtype, 150, 160, 2, 150);
  }
}

TEST_F(Gemm, ColumnsOfOddSizesAndInParts) {
  for (const std::int64_t cols : {1, 7, 33, 63, 252}) {
    expect_columns(DType::F32, 65, cols, 2, 65);
    expect_columns(DType::BF16, 3, cols, 2, 3);
  }
  for (const std::int64_t part : {64, 65, 127, 128, 199, 200}) {
    expect_columns(DType::Q4_1, 200, 96, 3, part);
  }
  expect_columns(DType::Q8_0, 0, 64, 2, 1);
  expect_columns(DType::Q8_0, 2, 64, 0, 2);
  EXPECT_THROW(expect_columns(DType::Q4_0, 70, 64, 2, 63), ShapeError);
}

// Every bit, beyond what sums show: rows of the identity.
TEST_F(Gemm, UnpackedColumnsAreTheRowsRounded) {
  for (const DType dtype :
       {DType::F32, DType::F16, DType::BF16, DType::Q4_0, DType::Q4_1, DType::Q8_0}) {
    constexpr std::int64_t kRows = 70, kCols = 64;
    const Packed w(dtype, kRows, kCols, 1);
    std::vector<std::byte> packed(size(column_panels(w.view()).bytes()));
    pack_column_panels(w.view(), packed.data());
    const DeviceBuffer<std::byte> panels = on_device(packed, stream);
    std::vector<std::uint16_t> identity(size(kCols * kCols));
    for (std::size_t c = 0; c < size(kCols); ++c) {
      identity[c * (size(kCols) + 1)] = kernels::f32_to_bf16(1);
    }
    const DeviceBuffer<std::uint16_t> in = on_device(identity, stream);
    const DeviceMatrix out(kCols, kRows);
    const DeviceBuffer<std::byte> workspace(gemm_workspace(0, kCols, kRows * kCols));
    gemm(blas, {w.view(), panels.data(), {in.data(), kCols, kCols}, out.view()},
         {workspace.data(), workspace.size()}, stream);
    const auto y = out.host(stream);
    std::vector<std::uint16_t> bits(size(kCols));
    for (std::size_t r = 0; r < size(kRows); ++r) {
      kernels::dequantize_row_bf16(dtype, w.view().row(static_cast<std::int64_t>(r)), bits);
      for (std::size_t c = 0; c < size(kCols); ++c) {
        ASSERT_EQ(y[c * size(kRows) + r], kernels::bf16_to_f32(bits[c])) << traits(dtype).name;
      }
    }
  }
}

TEST_F(Gemm, GroupsShareTheirInput) {
  const Packed q(DType::Q4_K, 10, 256, 1), k(DType::BF16, 5, 256, 2), v(DType::Q6_K, 6, 256, 3);
  const Packed down(DType::Q8_0, 4, 64, 4);
  const auto x = normal_values(6 * 256, 5), h = normal_values(6 * 64, 6);
  const DeviceMatrix dx(x, 6, 256, stream), dh(h, 6, 64, stream);
  std::vector<DeviceWeights> weights;
  std::vector<DeviceMatrix> out;
  std::vector<Product> products;
  for (const Packed* w : {&q, &k, &down, &v}) {
    weights.emplace_back(w->view(), stream);
    out.emplace_back(6, w->view().rows);
    products.push_back(
        {weights.back().view(), w == &down ? dh.view() : dx.view(), nullptr, out.back().view()});
  }
  const DeviceBuffer<std::byte> workspace(gemm_workspace(6, 256, 10 * 256));
  gemm(blas, products, {workspace.data(), workspace.size()}, stream);
  std::size_t i = 0;
  for (const Packed* w : {&q, &k, &down, &v}) {
    expect_equal(out[i].host(stream), rounded(w->view(), w == &down ? h : x), w->view().cols,
                 fmt::format("product {}", i));
    ++i;
  }
}

TEST_F(Gemm, AccumulatesAndKeepsWhatIsBetweenRows) {
  const Packed w(DType::Q8_0, 4, 64, 1);
  const auto x = normal_values(3 * 64, 2), before = normal_values(3 * 12, 3);
  const DeviceWeights weights(w.view(), stream);
  const DeviceMatrix in(x, 3, 64, stream), out(before, 3, 12, stream);
  const DeviceBuffer<std::byte> workspace(gemm_workspace(3, 64, 4 * 64));
  gemm(blas, {weights.view(), in.view(), nullptr, {out.view().data + 4, 3, 4, 12}, true},
       {workspace.data(), workspace.size()}, stream);
  const auto y = out.host(stream);
  const reference::Product expected = rounded(w.view(), x);
  for (std::size_t t = 0; t < 3; ++t) {
    for (std::size_t c = 0; c < 12; ++c) {
      const std::size_t at = 12 * t + c;
      if (c < 4 || c >= 8) {
        EXPECT_EQ(y[at], before[at]);
      } else {
        const std::size_t i = 4 * t + c - 4;
        EXPECT_NEAR(y[at], expected.value[i] + before[at],
                    70 * kEps * (expected.magnitude[i] + std::fabs(before[at])));
      }
    }
  }
}

TEST_F(Gemm, NanInOneTokenStaysThere) {
  const Packed w(DType::Q4_0, 4, 64, 1);
  std::vector<float> x = normal_values(3 * 64, 2);
  x[64 + 17] = kNan;
  const DeviceWeights weights(w.view(), stream);
  const DeviceMatrix in(x, 3, 64, stream), out(3, 4);
  const DeviceBuffer<std::byte> workspace(gemm_workspace(3, 64, 4 * 64));
  gemm(blas, {weights.view(), in.view(), nullptr, out.view()}, {workspace.data(), workspace.size()},
       stream);
  const auto y = out.host(stream);
  for (std::size_t i = 0; i < y.size(); ++i) EXPECT_EQ(std::isnan(y[i]), i / 4 == 1);
}

TEST_F(Gemm, NamesTheShapes) {
  const DeviceMatrix x(2, 64), y(2, 5);
  const DeviceWeights w(Packed(DType::F32, 5, 64, 1).view(), stream);
  const DeviceBuffer<std::byte> workspace(gemm_workspace(2, 64, 5 * 64));
  const std::span<std::byte> all(workspace.data(), workspace.size());
  const auto wrong = [&](const Product& p, std::span<std::byte> room) {
    EXPECT_THROW(gemm(blas, p, room, stream), ShapeError);
  };
  wrong({w.view(), x.view(), nullptr, x.view()}, all);
  wrong({w.view(), y.view(), nullptr, y.view()}, all);
  wrong({w.view(), {x.view().data + 1, 2, 64}, nullptr, y.view()}, all);
  wrong({w.view(), x.view(), y.view().data, y.view()}, all);
  wrong({w.view(), x.view(), nullptr, y.view()}, all.first(2 * 64 * 2 + 63 * 2));
  wrong({w.view(), x.view(), nullptr, y.view()}, all.first(2 * 64 * 2 - 2));
  const auto* x_bits = reinterpret_cast<const std::uint16_t*>(x.view().data);
  const Bf16Product good{w.view(), w.view().data, {x_bits, 2, 64}, y.view()};
  Bf16Product misaligned = good, narrow = good, none = good;
  misaligned.columns += 16;
  narrow.x.cols = 32;
  none.w.dtype = DType::Q6_K;
  for (const Bf16Product& p : {misaligned, narrow, none}) {
    EXPECT_THROW(gemm(blas, p, all, stream), ShapeError);
  }
}

}  // namespace
}  // namespace moesaic::cuda
