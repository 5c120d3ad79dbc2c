#include "kernels/cuda/secret_moe.h"

#include "kernels/base/error.h"
#include "tests/kernels/cuda/device_layer.h"

namespace moesaic::cuda {
namespace {

using kernels::MoeLayer;
using kernels::MoeOptions;
using kernels::MoeResult;
using kernels::SecretMoeView;

class SecretMoe : public OnDevice {
 protected:
  MoeResult run(const DeviceLayer& layer, const std::vector<float>& x) {
    return run(layer, x, zeroed_workspace(layer, stream));
  }
  MoeResult run(const DeviceLayer& layer, const std::vector<float>& x,
                const DeviceBuffer<std::byte>& workspace) {
    const auto d_model = static_cast<std::int64_t>(x.size());
    const DeviceMatrix in(x, 1, d_model, stream), out(1, d_model);
    const DeviceBuffer<std::int32_t> ids(size(layer.view.n_active));
    secret_moe_token(layer.view, in.view(), out.view(), ids.data(), workspace.data(), stream);
    return {out.host(stream), on_host(ids, stream)};
  }
  void expect_token(const MoeOptions& options) {
    const MoeLayer host(options);
    const DeviceLayer layer(host, stream);
    const auto x = normal_values(size(options.d_model), 10);
    const MoeResult found = run(layer, x);
    kernels::expect_layer(host.view, x, found,
                          (16 + static_cast<double>(options.d_model) / 32) * kEps);
  }
};

TEST_F(SecretMoe, EveryDTypeOfNeurons) {
  for (const DTypeTraits& t : kDTypes) {
    MoeOptions o{.experts = t.dtype};
    if (t.block_elems == 256) o.d_model = 512;
    expect_token(o);
  }
}

TEST_F(SecretMoe, EveryDTypeOfRouter) {
  for (const DTypeTraits& t : kDTypes) {
    MoeOptions o{.experts = DType::BF16, .router = t.dtype};
    if (t.block_elems == 256) o.d_model = o.router_rank = o.bypass_rank = 256;
    expect_token(o);
  }
}

TEST_F(SecretMoe, SizesAcrossSlicesAndGroups) {
  for (const std::int64_t d_model : {32, 224, 256, 288, 576}) {
    expect_token({.d_model = d_model, .n_shared = 33, .n_experts = 150, .n_active = 70});
  }
  // Several groups of neurons, the last one short.
  expect_token(
      {.experts = DType::F32, .d_model = 96, .n_shared = 101, .n_experts = 150, .n_active = 102});
  expect_token({.experts = DType::BF16,
                .router = DType::F32,
                .d_model = 68,
                .router_rank = 7,
                .bypass_rank = 0});
}

TEST_F(SecretMoe, NoSharedNoActiveNoBypass) {
  expect_token({.n_shared = 0});
  expect_token({.n_active = 0});
  expect_token({.n_shared = 0, .n_active = 0});
  expect_token({.bypass_rank = 0});
  expect_token({.n_shared = 0, .n_active = 0, .bypass_rank = 0});
  expect_token({.n_experts = 0, .n_active = 0});
}

TEST_F(SecretMoe, KEqualsNExpertsAndOne) {
  expect_token({.n_active = 40});
  expect_token({.n_active = 1});
}

TEST_F(SecretMoe, SharedAndBypassOfOtherDTypes) {
  MoeLayer other({.experts = DType::Q8_0});
  other.shared = Packed(DType::Q4_1, 3 * 5, 96, 1, 0.2f);
  other.view.shared = other.shared.view();
  other.bypass_p = Packed(DType::Q4_0, 96, 32, 8);
  other.view.bypass_p = other.bypass_p.view();
  const DeviceLayer layer(other, stream);
  const auto x = normal_values(96, 10);
  kernels::expect_layer(other.view, x, run(layer, x), 32 * kEps);
}

// The sum that the experts' launch goes on from is then the bias's no longer.
TEST_F(SecretMoe, SharedOfAnotherDTypeWithoutBypass) {
  MoeLayer other({.experts = DType::Q8_0, .bypass_rank = 0});
  other.shared = Packed(DType::Q4_1, 3 * 5, 96, 1, 0.2f);
  other.view.shared = other.shared.view();
  const DeviceLayer layer(other, stream);
  const auto x = normal_values(96, 10);
  kernels::expect_layer(other.view, x, run(layer, x), 32 * kEps);
}

TEST_F(SecretMoe, TiesPickLowestId) {
  const MoeLayer host({.router = DType::F32});
  DeviceLayer layer(host, stream);
  layer.router_bias = on_device(std::vector<float>(40, 1.0f), stream);
  layer.view.router_bias = {layer.router_bias.data(), 40};
  zero_bytes(const_cast<std::byte*>(layer.view.router_u.data), size(layer.view.router_u.bytes()),
             stream);
  const MoeResult found = run(layer, normal_values(96, 11));
  for (std::size_t i = 0; i < found.ids.size(); ++i) {
    EXPECT_EQ(found.ids[i], static_cast<std::int32_t>(i));
  }
}

TEST_F(SecretMoe, NanInXPicksTheFirstExperts) {
  const MoeLayer host({});
  const DeviceLayer layer(host, stream);
  auto x = normal_values(96, 12);
  x[5] = kNan;
  const MoeResult found = run(layer, x);
  for (std::size_t i = 0; i < found.ids.size(); ++i) {
    EXPECT_EQ(found.ids[i], static_cast<std::int32_t>(i));
  }
  for (const float y : found.y) EXPECT_TRUE(std::isnan(y));
}

TEST_F(SecretMoe, RepeatsBitForBitWithTheSameWorkspace) {
  const MoeLayer host({.d_model = 288, .n_shared = 40, .n_experts = 300, .n_active = 90});
  const DeviceLayer layer(host, stream);
  const auto workspace = zeroed_workspace(layer, stream);
  const auto x = normal_values(288, 13), other = normal_values(288, 14);
  const MoeResult first = run(layer, x, workspace);
  run(layer, other, workspace);
  const MoeResult again = run(layer, x, workspace);
  EXPECT_EQ(first.ids, again.ids);
  EXPECT_EQ(first.y, again.y);
}

TEST_F(SecretMoe, NamesTheShapes) {
  const MoeLayer host({});
  const DeviceLayer layer(host, stream);
  const DeviceMatrix x(1, 96), two(2, 96), narrow(1, 64);
  const auto expect_thrown = [&](Matrix in, Matrix out) {
    EXPECT_THROW(secret_moe_token(layer.view, in, out, nullptr, nullptr, stream), ShapeError);
  };
  expect_thrown(two.view(), x.view());
  expect_thrown(x.view(), narrow.view());
  SecretMoeView wrong = layer.view;
  wrong.n_active = 41;
  EXPECT_THROW(secret_moe_token(wrong, x.view(), x.view(), nullptr, nullptr, stream), ShapeError);
}

}  // namespace
}  // namespace moesaic::cuda
