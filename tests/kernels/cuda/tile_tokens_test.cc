#include "kernels/cuda/tile_tokens.h"

#include <numeric>
#include <random>

#include "kernels/base/error.h"
#include "tests/kernels/cuda/device.h"
#include "tests/kernels/support.h"

namespace moesaic::cuda {
namespace {

class TileTokensOf : public OnDevice {
 protected:
  // ids [n_tokens, k] against the obvious loops.
  void expect_tiles(const std::vector<std::int32_t>& ids, std::int64_t k, std::int64_t n_tiles,
                    std::int64_t stride) {
    const std::int64_t n_tokens = k == 0 ? 0 : std::ssize(ids) / k;
    const auto device_ids = on_device(ids, stream);
    const DeviceBuffer<std::uint16_t> masks(size(n_tiles * stride));
    const DeviceBuffer<std::uint32_t> entries(size(n_tiles * stride));
    const DeviceBuffer<std::int32_t> counts(size(n_tiles));
    tile_tokens(device_ids.data(), n_tokens, k,
                {masks.data(), entries.data(), counts.data(), n_tiles, stride}, stream);
    const auto found = on_host(masks, stream);
    const auto n_found = on_host(counts, stream);
    for (std::int64_t tile = 0; tile < n_tiles; ++tile) {
      std::vector<std::uint32_t> expected;
      for (std::int64_t t = 0; t < stride; ++t) {
        std::uint32_t mask = 0;
        for (std::int64_t j = 0; t < n_tokens && j < k; ++j) {
          const std::int32_t id = ids[size(t * k + j)];
          if (id / kTileExperts == tile) mask |= 1U << (id % kTileExperts);
        }
        EXPECT_EQ(found[size(tile * stride + t)], mask) << tile << ", " << t;
        if (mask != 0) expected.push_back(static_cast<std::uint32_t>(t) | mask << 16);
      }
      ASSERT_EQ(n_found[size(tile)], std::ssize(expected)) << tile;
      if (expected.empty()) continue;
      std::vector<std::uint32_t> listed(expected.size());
      copy_bytes_out(listed.data(),
                     reinterpret_cast<const std::byte*>(entries.data() + tile * stride),
                     listed.size() * sizeof(listed[0]), stream);
      stream.synchronize();
      EXPECT_EQ(listed, expected) << tile;
    }
  }
  static std::vector<std::int32_t> random_ids(std::int64_t n_tokens, std::int64_t k,
                                              std::int32_t n_experts) {
    std::mt19937 rng(7);
    std::vector<std::int32_t> all(size(n_experts)), ids;
    std::iota(all.begin(), all.end(), 0);
    for (std::int64_t t = 0; t < n_tokens; ++t) {
      std::sample(all.begin(), all.end(), std::back_inserter(ids), k, rng);
    }
    return ids;
  }
};

TEST_F(TileTokensOf, RandomChoices) {
  expect_tiles(random_ids(1, 3, 16), 3, 1, 32);
  expect_tiles(random_ids(33, 7, 40), 7, 3, 64);
  expect_tiles(random_ids(70, 40, 70), 40, 5, 128);
}

TEST_F(TileTokensOf, MoreTilesThanABlockMarks) {
  expect_tiles(random_ids(5, 30, 4200), 30, 263, 32);
}

TEST_F(TileTokensOf, AllNoneAndTheLast) {
  expect_tiles(random_ids(20, 48, 48), 48, 3, 32);           // everything chosen by all
  expect_tiles(std::vector<std::int32_t>(9, 47), 1, 3, 32);  // by all the last, by none the others
  expect_tiles({}, 0, 3, 32);
}

TEST_F(TileTokensOf, NamesTheStride) {
  const auto expect_thrown = [&](std::int64_t n_tokens, std::int64_t stride) {
    EXPECT_THROW(tile_tokens(nullptr, n_tokens, 1, {nullptr, nullptr, nullptr, 1, stride}, stream),
                 ShapeError);
  };
  expect_thrown(33, 32);
  expect_thrown(3, 40);
}

}  // namespace
}  // namespace moesaic::cuda
