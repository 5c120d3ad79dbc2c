#include "kernels/embedding.h"

#include <string>

#include "kernels/base/error.h"
#include "kernels/quant.h"
#include "tests/kernels/support.h"

namespace moesaic {
namespace {

constexpr std::int64_t kVocab = 50;
constexpr std::int64_t kDim = 64;

// A table with its packed bytes, and what they stand for.
struct Table {
  explicit Table(DType dtype)
      : bytes(size(kVocab * row_bytes(dtype, kDim))), values(kVocab * kDim) {
    const auto source = normal_values(values.size(), 1);
    view = {bytes.data(), dtype, kVocab, kDim};
    for (std::int64_t r = 0; r < kVocab; ++r) {
      const std::size_t at = size(r * kDim);
      std::byte* row = bytes.data() + r * view.row_bytes();
      kernels::quantize_row(dtype, std::span(source).subspan(at, kDim), row);
      kernels::dequantize_row(dtype, row, std::span(values).subspan(at, kDim));
    }
  }
  std::vector<std::byte> bytes;
  std::vector<float> values;
  WeightView view;
};

TEST(Embedding, RowsOfEveryWritableDType) {
  for (const DTypeTraits& t : kDTypes) {
    if (!kernels::can_quantize(t.dtype)) continue;
    const Table table(t.dtype);
    Lender lender(2);
    for (const std::int64_t n : {0, 1, 7, 600}) {
      std::vector<std::int32_t> ids;
      for (std::int64_t i = 0; i < n; ++i)
        ids.push_back(static_cast<std::int32_t>(i * 31 % kVocab));
      std::vector<float> x(size(n * kDim));
      lender.tally.reset();
      kernels::embed(lender.ctx, table.view, ids, 1.0f, {x.data(), n, kDim});
      for (std::size_t i = 0; i < x.size(); ++i) {
        ASSERT_EQ(x[i], table.values[size(ids[i / kDim]) * kDim + i % kDim]) << t.name;
      }
      EXPECT_EQ(lender.tally.bytes(Traffic::Embedding), n * table.view.row_bytes());
      EXPECT_EQ(lender.tally.total(), n * table.view.row_bytes());
    }
  }
}

TEST(Embedding, Scales) {
  const Table table(DType::F32);
  Lender lender;
  const std::vector<std::int32_t> ids = {0, static_cast<std::int32_t>(kVocab) - 1};
  std::vector<float> x(2 * kDim);
  kernels::embed(lender.ctx, table.view, ids, 25.298221f, {x.data(), 2, kDim});
  for (std::size_t i = 0; i < kDim; ++i) {
    EXPECT_EQ(x[i], table.values[i] * 25.298221f);
    EXPECT_EQ(x[kDim + i], table.values[(kVocab - 1) * kDim + i] * 25.298221f);
  }
}

TEST(Embedding, NamesTheIdOutsideTheVocabulary) {
  const Table table(DType::F32);
  Lender lender;
  std::vector<float> x(2 * kDim);
  for (const std::int32_t id : {-1, 50, 123456}) {
    const std::vector<std::int32_t> ids = {3, id};
    try {
      kernels::embed(lender.ctx, table.view, ids, 1.0f, {x.data(), 2, kDim});
      FAIL() << "no exception for id " << id;
    } catch (const InputError& e) {
      EXPECT_NE(std::string(e.what()).find(std::to_string(id)), std::string::npos) << e.what();
      EXPECT_NE(std::string(e.what()).find("50 tokens"), std::string::npos) << e.what();
    }
  }
}

TEST(Embedding, NamesTheShapes) {
  const Table table(DType::F32);
  Lender lender;
  std::vector<float> x(2 * kDim);
  const std::vector<std::int32_t> ids = {3, 4};
  EXPECT_THROW(kernels::embed(lender.ctx, table.view, ids, 1.0f, {x.data(), 1, kDim}), ShapeError);
  EXPECT_THROW(kernels::embed(lender.ctx, table.view, ids, 1.0f, {x.data(), 2, 32}), ShapeError);
}

}  // namespace
}  // namespace moesaic
