#include "engine/kv_cache.h"

#include <gtest/gtest.h>

#include <cstdint>

#include "kernels/base/error.h"

namespace moesaic::engine {
namespace {

TEST(KvCache, LayersLieOneAfterTheOther) {
  HostKvCache cache(3, 2, 5, 4, 8);
  const std::int64_t per_layer = 2 * 5 * 4 * 8;
  EXPECT_EQ(cache.bytes(), 3 * 2 * per_layer * 4);
  for (int layer = 0; layer < 3; ++layer) {
    const kernels::KvLayerView view = cache.layer(layer);
    EXPECT_EQ(view.keys, cache.layer(0).keys + 2 * layer * per_layer);
    EXPECT_EQ(view.values, view.keys + per_layer);
    EXPECT_EQ(view.n_slots, 2);
    EXPECT_EQ(view.capacity, 5);
    EXPECT_EQ(view.row(), 32);
  }
}

TEST(KvCache, IsZeroAlignedAndWritableToTheLastElement) {
  HostKvCache cache(2, 1, 7, 1, 2);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(cache.layer(0).keys) % 64, 0U);
  float* all = cache.layer(0).keys;
  const std::int64_t n = cache.bytes() / 4;
  for (std::int64_t i = 0; i < n; ++i) {
    EXPECT_EQ(all[i], 0.0F);
    all[i] = 1;
  }
}

TEST(KvCache, SizesThatAreNotPositiveAreRefused) {
  EXPECT_THROW(HostKvCache(0, 1, 1, 1, 1), InputError);
  EXPECT_THROW(HostKvCache(1, 0, 1, 1, 1), InputError);
  EXPECT_THROW(HostKvCache(1, 1, -1, 1, 1), InputError);
  EXPECT_THROW(HostKvCache(1, 1, 1, 0, 1), InputError);
  EXPECT_THROW(HostKvCache(1, 1, 1, 1, 0), InputError);
}

TEST(KvCache, SizeThatOverflowsIsRefused) {
  EXPECT_THROW(HostKvCache(1000, std::int64_t{1} << 40, std::int64_t{1} << 40, 8, 128), InputError);
}

TEST(KvCache, LayerOutsideIsRefused) {
  HostKvCache cache(2, 1, 1, 1, 2);
  EXPECT_THROW(cache.layer(2), ShapeError);
  EXPECT_THROW(cache.layer(-1), ShapeError);
}

}  // namespace
}  // namespace moesaic::engine
