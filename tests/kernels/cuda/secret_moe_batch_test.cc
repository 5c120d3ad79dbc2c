#include <array>

#include "kernels/base/error.h"
#include "kernels/cuda/secret_moe.h"
#include "tests/kernels/cuda/device_layer.h"

namespace moesaic::cuda {
namespace {

using kernels::MoeLayer;
using kernels::MoeOptions;
using kernels::MoePath;
using kernels::MoeResult;

// Gate, up, x and h, w_down are rounded to 8 bits each, and gate and up are products of two.
constexpr double kRounding = 6.5 / 512;
// Of all outputs together: roundings do not all point one way.
constexpr double kMeanError = 0.01;

class SecretMoeBatch : public OnDevice {
 protected:
  static std::int64_t rows(const MoeLayer& host, const std::vector<float>& x) {
    return std::ssize(x) / host.view.d_model();
  }
  DeviceBuffer<std::byte> zeroed(const DeviceLayer& layer, std::int64_t n) const {
    DeviceBuffer<std::byte> workspace(secret_moe_batch_workspace(layer.view, n));
    zero_bytes(workspace.data(), workspace.size(), stream);
    return workspace;
  }
  MoeResult run(const DeviceLayer& layer, const std::vector<float>& x, MoePath path) {
    return run(layer, x, path, zeroed(layer, std::ssize(x) / layer.view.d_model()));
  }
  MoeResult run(const DeviceLayer& layer, const std::vector<float>& x, MoePath path,
                const DeviceBuffer<std::byte>& workspace) {
    const std::int64_t d_model = layer.view.d_model(), n = std::ssize(x) / d_model;
    const DeviceMatrix in(x, n, d_model, stream), out(n, d_model);
    const DeviceBuffer<std::int32_t> ids(size(n * layer.view.n_active));
    secret_moe_batch(layer.view, in.view(), out.view(), ids.data(), workspace.data(), stream, path);
    return {out.host(stream), on_host(ids, stream)};
  }
  static void expect_close(const MoeLayer& host, const std::vector<float>& x,
                           const MoeResult& found) {
    kernels::expect_layer(host.view, x, found, kRounding);
    const auto expected = reference::secret_moe(
        host.view, ConstMatrix(x.data(), rows(host, x), host.view.d_model()), found.ids);
    double difference = 0, all = 0;
    for (std::size_t i = 0; i < found.y.size(); ++i) {
      difference += (found.y[i] - expected.y[i]) * (found.y[i] - expected.y[i]);
      all += expected.y[i] * expected.y[i];
    }
    EXPECT_LE(difference, kMeanError * kMeanError * all);
  }
  // Both paths, which add the same numbers in the same order.
  void expect_batch(const MoeLayer& host, std::int64_t n) {
    const DeviceLayer layer(host, stream);
    const auto x = normal_values(size(n * host.view.d_model()), 10);
    const MoeResult grouped = run(layer, x, MoePath::Grouped);
    expect_close(host, x, grouped);
    const MoeResult masked = run(layer, x, MoePath::Masked);
    EXPECT_EQ(grouped.ids, masked.ids);
    EXPECT_EQ(grouped.y, masked.y);
  }
  void expect_batch(const MoeOptions& options, std::int64_t n) {
    expect_batch(MoeLayer(options), n);
  }
};

TEST_F(SecretMoeBatch, EveryDTypeOfNeurons) {
  for (const DTypeTraits& t : kDTypes) {
    MoeOptions o{.experts = t.dtype};
    if (t.block_elems == 256) o.d_model = 512;
    expect_batch(o, 20);
  }
}

TEST_F(SecretMoeBatch, SizesAcrossTiles) {
  for (const std::int64_t d_model : {32, 128, 160, 288}) {
    expect_batch({.d_model = d_model, .n_shared = 33, .n_experts = 75, .n_active = 9}, 17);
  }
  // Rows that are no whole blocks.
  expect_batch({.experts = DType::BF16, .router = DType::F32, .d_model = 68, .router_rank = 7}, 18);
}

TEST_F(SecretMoeBatch, TokensAcrossBlocksAndChunks) {
  for (const std::int64_t n : {1, 16, 63, 64, 65, 130, 514}) {
    expect_batch({.d_model = 32, .n_shared = 3, .n_experts = 36, .n_active = 5}, n);
  }
}

TEST_F(SecretMoeBatch, NoSharedNoActiveNoBypass) {
  expect_batch({.n_shared = 0}, 9);
  expect_batch({.n_active = 0}, 9);
  expect_batch({.n_shared = 0, .n_active = 0}, 9);
  expect_batch({.bypass_rank = 0}, 9);
  expect_batch({.n_shared = 0, .n_active = 0, .bypass_rank = 0}, 9);
  expect_batch({.n_experts = 0, .n_active = 0}, 9);
}

TEST_F(SecretMoeBatch, KEqualsNExpertsAndOneOfMany) {
  expect_batch({.n_active = 40}, 9);
  expect_batch({.n_experts = 300, .n_active = 1}, 9);  // tiles that no token wants
}

// Biases decide: one expert is everybody's, and 16 are nobody's.
TEST_F(SecretMoeBatch, ChosenByAllAndByNone) {
  MoeLayer host({.router = DType::F32, .n_experts = 64});
  host.router_bias[37] = 1e4F;
  for (std::size_t e = 16; e < 32; ++e) host.router_bias[e] = -1e4F;
  const DeviceLayer layer(host, stream);
  const auto x = normal_values(33 * 96, 11);
  for (const MoePath path : {MoePath::Grouped, MoePath::Masked}) {
    const MoeResult found = run(layer, x, path);
    EXPECT_EQ(std::ranges::count(found.ids, 37), 33);
    EXPECT_TRUE(std::ranges::none_of(found.ids, [](std::int32_t e) { return e >= 16 && e < 32; }));
    expect_close(host, x, found);
  }
}

// More tiles than one block marks.
TEST_F(SecretMoeBatch, ThousandsOfExperts) {
  expect_batch({.d_model = 32, .n_shared = 1, .n_experts = 4200, .n_active = 30}, 5);
}

TEST_F(SecretMoeBatch, SharedAndBypassOfOtherDTypes) {
  MoeLayer other({.experts = DType::Q8_0});
  other.shared = Packed(DType::Q4_1, 3 * 5, 96, 1, 0.2f);
  other.view.shared = other.shared.view();
  other.bypass_p = Packed(DType::Q4_0, 96, 32, 8);
  other.view.bypass_p = other.bypass_p.view();
  expect_batch(other, 21);
}

TEST_F(SecretMoeBatch, TokensSelectWhatTheySelectAlone) {
  const MoeLayer host({.n_experts = 90, .n_active = 30});
  const DeviceLayer layer(host, stream);
  const auto x = normal_values(11 * 96, 12);
  const MoeResult found = run(layer, x, MoePath::Auto);
  const auto workspace = zeroed_workspace(layer, stream);
  const DeviceMatrix in(x, 11, 96, stream), out(1, 96);
  for (std::int64_t t = 0; t < 11; ++t) {
    const DeviceBuffer<std::int32_t> ids(30);
    secret_moe_token(layer.view, in.view().slice(t, 1), out.view(), ids.data(), workspace.data(),
                     stream);
    const auto alone = on_host(ids, stream);
    EXPECT_TRUE(std::equal(alone.begin(), alone.end(), found.ids.begin() + 30 * t)) << t;
  }
}

TEST_F(SecretMoeBatch, TiesPickLowestId) {
  const MoeLayer host({.router = DType::F32});
  DeviceLayer layer(host, stream);
  layer.router_bias = on_device(std::vector<float>(40, 1.0f), stream);
  layer.view.router_bias = {layer.router_bias.data(), 40};
  zero_bytes(const_cast<std::byte*>(layer.view.router_u.data), size(layer.view.router_u.bytes()),
             stream);
  const MoeResult found = run(layer, normal_values(5 * 96, 11), MoePath::Grouped);
  for (std::size_t i = 0; i < found.ids.size(); ++i) {
    EXPECT_EQ(found.ids[i], static_cast<std::int32_t>(i % 11));
  }
}

TEST_F(SecretMoeBatch, NanStaysInItsRow) {
  const MoeLayer host({});
  const DeviceLayer layer(host, stream);
  auto x = normal_values(20 * 96, 12);
  const MoeResult before = run(layer, x, MoePath::Grouped);
  x[3 * 96 + 5] = kNan;
  for (const MoePath path : {MoePath::Grouped, MoePath::Masked}) {
    const MoeResult found = run(layer, x, path);
    for (std::size_t i = 0; i < found.y.size(); ++i) {
      if (i / 96 == 3) {
        EXPECT_TRUE(std::isnan(found.y[i]));
      } else {
        EXPECT_EQ(found.y[i], before.y[i]);
      }
    }
  }
}

TEST_F(SecretMoeBatch, RepeatsBitForBitWithTheSameWorkspace) {
  const MoeLayer host({.n_shared = 40, .n_experts = 300, .n_active = 20});
  const DeviceLayer layer(host, stream);
  const auto workspace = zeroed(layer, 70);
  const auto x = normal_values(70 * 96, 13), other = normal_values(9 * 96, 14);
  const MoeResult first = run(layer, x, MoePath::Grouped, workspace);
  run(layer, other, MoePath::Masked, workspace);
  const MoeResult again = run(layer, x, MoePath::Grouped, workspace);
  EXPECT_EQ(first.ids, again.ids);
  EXPECT_EQ(first.y, again.y);
}

TEST_F(SecretMoeBatch, SparseLayersAreGrouped) {
  EXPECT_EQ(choose_secret_moe_path(MoeLayer({.n_experts = 400, .n_active = 8}).view),
            MoePath::Grouped);
  EXPECT_EQ(choose_secret_moe_path(MoeLayer({.n_experts = 40, .n_active = 10}).view),
            MoePath::Masked);
  EXPECT_EQ(choose_secret_moe_path(MoeLayer({.n_active = 0}).view), MoePath::Masked);
}

TEST_F(SecretMoeBatch, NamesTheShapes) {
  const MoeLayer host({});
  const DeviceLayer layer(host, stream);
  const DeviceMatrix x(2, 96), three(3, 96), narrow(2, 64);
  const auto expect_thrown = [&](Matrix in, Matrix out, MoePath path) {
    EXPECT_THROW(secret_moe_batch(layer.view, in, out, nullptr, nullptr, stream, path), ShapeError);
  };
  expect_thrown(three.view(), x.view(), MoePath::Auto);
  expect_thrown(x.view(), narrow.view(), MoePath::Auto);
  expect_thrown(x.view(), x.view(), MoePath::Gather);
}

}  // namespace
}  // namespace moesaic::cuda
