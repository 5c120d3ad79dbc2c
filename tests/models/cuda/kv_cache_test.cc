#include "models/cuda/kv_cache.h"

#include <algorithm>
#include <numeric>

#include "tests/kernels/cuda/device.h"

namespace moesaic::models {
namespace {

// Pages of 2 layers · 2 · 64 positions · 2 heads of 8: 16 KiB.
constexpr engine::DecoderShape kShape{.n_layers = 2, .n_kv_heads = 2, .head_dim = 8};

class CudaKvCacheTest : public cuda::OnDevice {
 protected:
  // Positions [begin, end) of a slot.
  void reach(CudaKvCache& cache, std::int32_t slot, std::int32_t begin, std::int32_t end) {
    std::vector<std::int32_t> positions(static_cast<std::size_t>(end - begin));
    std::iota(positions.begin(), positions.end(), begin);
    const std::vector<std::int32_t> slots(positions.size(), slot), tokens(positions.size());
    cache.reach({tokens, slots, positions, {}}, stream);
  }
  // As the device has it, which is not written beyond the first `n` pages of a slot.
  std::vector<float*> pages(const CudaKvCache& cache, std::int64_t slot, std::int64_t n) {
    const cuda::PagedKv view = cache.layer(0);
    std::vector<float*> table(static_cast<std::size_t>(n));
    cuda::copy_bytes_out(
        table.data(), reinterpret_cast<const std::byte*>(view.pages + slot * view.pages_per_slot),
        table.size() * sizeof(float*), stream);
    stream.synchronize();
    return table;
  }
};

TEST_F(CudaKvCacheTest, LayersLieOneAfterTheOtherInAPage) {
  const CudaKvCache cache(kShape, 3, 65);
  EXPECT_EQ(cache.layer(0).pages_per_slot, 2);
  EXPECT_EQ(cache.layer(0).keys, 0);
  EXPECT_EQ(cache.layer(0).values, 64 * 16);
  EXPECT_EQ(cache.layer(1).keys, 2 * 64 * 16);
  EXPECT_EQ(cache.layer(1).values, 3 * 64 * 16);
  EXPECT_EQ(cache.layer(1).row(), 16);
  EXPECT_THROW(cache.layer(2), ShapeError);
  EXPECT_THROW(cache.layer(-1), ShapeError);
}

TEST_F(CudaKvCacheTest, HoldsMemoryForWhatIsReachedAndNoMore) {
  // Of a model so large that each page is allocated alone.
  const engine::DecoderShape large{.n_layers = 64, .n_kv_heads = 8, .head_dim = 256};
  CudaKvCache cache(large, 4, 1000);
  const std::int64_t page = std::int64_t{2} * 64 * 64 * 8 * 256 * 4;
  EXPECT_EQ(cache.bytes(), 0);
  reach(cache, 1, 0, 1);
  EXPECT_EQ(cache.bytes(), page);
  reach(cache, 1, 1, 64);
  EXPECT_EQ(cache.bytes(), page);
  reach(cache, 1, 64, 65);
  EXPECT_EQ(cache.bytes(), 2 * page);
  reach(cache, 3, 0, 129);
  EXPECT_EQ(cache.bytes(), 5 * page);
}

TEST_F(CudaKvCacheTest, PagesOfSequencesDiffer) {
  CudaKvCache cache(kShape, 2, 200);
  reach(cache, 0, 0, 70);
  reach(cache, 1, 0, 130);
  std::vector<float*> all = pages(cache, 0, 2);
  const std::vector<float*> of_second = pages(cache, 1, 3);
  all.insert(all.end(), of_second.begin(), of_second.end());
  std::ranges::sort(all);
  for (std::size_t i = 1; i < all.size(); ++i) {
    EXPECT_GE(all[i] - all[i - 1], 2 * 2 * 64 * 16);
  }
}

TEST_F(CudaKvCacheTest, ASequenceThatBeginsAnewGivesItsPagesBack) {
  CudaKvCache cache(kShape, 2, 200);
  reach(cache, 0, 0, 200);
  const std::vector<float*> before = pages(cache, 0, 4);
  reach(cache, 0, 0, 60);
  EXPECT_EQ(pages(cache, 0, 1)[0], before[0]);
  reach(cache, 1, 0, 10);
  EXPECT_EQ(pages(cache, 1, 1)[0], before[1]);
  reach(cache, 0, 60, 129);
  EXPECT_EQ(pages(cache, 0, 3), (std::vector<float*>{before[0], before[2], before[3]}));
}

TEST_F(CudaKvCacheTest, AllSlotsFillUp) {
  CudaKvCache cache(kShape, 3, 130);
  for (std::int32_t slot = 0; slot < 3; ++slot) reach(cache, slot, 0, 130);
  EXPECT_EQ(cache.bytes(), 3 * 3 * 16384);
}

TEST_F(CudaKvCacheTest, SaysWhatItHoldsWhereNoPageFits) {
  // 4 TiB a page: more than any device has.
  const engine::DecoderShape huge{.n_layers = 1 << 17, .n_kv_heads = 256, .head_dim = 256};
  CudaKvCache cache(huge, 2, 64);
  try {
    reach(cache, 0, 0, 1);
    FAIL() << "no end of memory";
  } catch (const DeviceError& e) {
    const std::string text = e.what();
    EXPECT_NE(text.find("KV cache of 0 positions in 0 bytes"), std::string::npos) << text;
    EXPECT_NE(text.find("4398046511104 bytes of device memory"), std::string::npos) << text;
  }
  EXPECT_EQ(cache.bytes(), 0);
}

}  // namespace
}  // namespace moesaic::models
