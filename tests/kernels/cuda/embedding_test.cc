#include "kernels/cuda/embedding.h"

#include "kernels/base/error.h"
#include "tests/kernels/cuda/device.h"
#include "tests/kernels/packed.h"
#include "tests/kernels/support.h"
#include "tests/reference/linear.h"

namespace moesaic::cuda {
namespace {

class Embedding : public OnDevice {
 protected:
  void expect_rows(DType dtype, std::int64_t vocab, std::int64_t cols, float scale,
                   const std::vector<std::int32_t>& ids) {
    const Packed table(dtype, vocab, cols, 1);
    const auto values = reference::unpack(table.view());
    const DeviceWeights weights(table.view(), stream);
    const auto device_ids = on_device(ids, stream);
    const DeviceMatrix x(static_cast<std::int64_t>(ids.size()), cols);
    embed(weights.view(), device_ids.data(), scale, x.view(), stream);
    const auto found = x.host(stream);
    for (std::size_t i = 0; i < found.size(); ++i) {
      const std::size_t at = size(ids[i / size(cols)] * cols) + i % size(cols);
      ASSERT_EQ(found[i], values[at] * scale) << traits(dtype).name << " element " << i;
    }
  }
};

TEST_F(Embedding, RowsOfEveryDTypeBitForBit) {
  for (const DTypeTraits& t : kDTypes) {
    const std::int64_t block = std::max<std::int64_t>(t.block_elems, 32);
    for (const std::int64_t cols : {block, 3 * block, 5 * std::int64_t{256}}) {
      expect_rows(t.dtype, 5, cols, 1.0f, {4, 0, 3, 3});
    }
  }
}

TEST_F(Embedding, OddColumns) {
  for (const DType dtype : {DType::F32, DType::F16, DType::BF16}) {
    for (const std::int64_t cols : {1, 3, 130, 1027}) expect_rows(dtype, 4, cols, 1.0f, {0, 3, 1});
  }
}

TEST_F(Embedding, ScalesAndNoTokens) {
  expect_rows(DType::Q8_0, 7, 96, 25.298221f, {6, 1});
  expect_rows(DType::Q8_0, 7, 96, 2.0f, {});
}

TEST_F(Embedding, IdOutsideTheTableIsNan) {
  const Packed table(DType::BF16, 3, 40, 1);
  const DeviceWeights weights(table.view(), stream);
  const auto ids = on_device(std::vector<std::int32_t>{-1, 3, 0}, stream);
  const DeviceMatrix x(3, 40);
  embed(weights.view(), ids.data(), 1.0f, x.view(), stream);
  const auto found = x.host(stream);
  for (std::size_t i = 0; i < found.size(); ++i) EXPECT_EQ(std::isnan(found[i]), i < 80);
}

TEST_F(Embedding, NamesTheShapes) {
  const DeviceMatrix x(2, 32);
  EXPECT_THROW(embed({nullptr, DType::F32, 2, 31}, nullptr, 1, x.view(), stream), ShapeError);
  EXPECT_THROW(embed({nullptr, DType::Q4_K, 2, 32}, nullptr, 1, x.view(), stream), ShapeError);
}

}  // namespace
}  // namespace moesaic::cuda
