#include "kernels/cuda/mixture.h"

#include "kernels/base/error.h"
#include "tests/kernels/cuda/device_mixture.h"

namespace moesaic::cuda {
namespace {

using kernels::MixtureLayer;
using kernels::MixtureOptions;
using kernels::MixtureResult;
using enum kernels::ExpertKind;
using enum kernels::RouterKind;
using kernels::GateKind;

class Mixture : public OnDevice {
 protected:
  MixtureResult run(const DeviceMixture& layer, const std::vector<float>& x) {
    const std::int64_t d_model = layer.view.d_model(), n = std::ssize(x) / d_model;
    const bool gated = layer.view.kind.gate != GateKind::None;
    const std::size_t k = size(n * layer.view.n_active);
    const DeviceMatrix in(x, n, d_model, stream), out(n, d_model);
    const DeviceBuffer<std::int32_t> ids(k);
    const DeviceBuffer<float> gates(gated ? k : 0);
    const DeviceBuffer<std::byte> workspace(mixture_workspace(layer.view));
    mixture(layer.view, in.view(), out.view(), ids.data(), gated ? gates.data() : nullptr,
            workspace.data(), stream);
    return {out.host(stream), on_host(ids, stream), on_host(gates, stream)};
  }
  void expect_layer(const MixtureOptions& options, std::int64_t n_tokens = 2) {
    const MixtureLayer host(options);
    const DeviceMixture layer(host, stream);
    const auto x = normal_values(size(n_tokens * options.d_model), 20);
    kernels::expect_layer(host.view, x, run(layer, x),
                          (16 + static_cast<double>(options.d_model) / 32) * kEps);
  }
};

TEST_F(Mixture, EveryKind) {
  for (const auto expert : {Glu, Gelu, Linear}) {
    for (const auto router : {LowRank, FullRank, ProductKey}) {
      for (const auto gate : {GateKind::None, GateKind::Softmax, GateKind::Score}) {
        expect_layer({.kind = {expert, router, gate}});
        expect_layer({.kind = {expert, router, gate}, .n_experts = 9, .block = 3, .n_active = 4});
      }
    }
  }
}

TEST_F(Mixture, EveryDTypeOfNeurons) {
  for (const DTypeTraits& t : kDTypes) {
    MixtureOptions o{.kind = {Glu, LowRank, GateKind::Softmax}, .experts = t.dtype};
    if (t.block_elems == 256) o.d_model = 512;
    expect_layer(o);
  }
}

TEST_F(Mixture, SizesAcrossSlicesAndPasses) {
  for (const std::int64_t n_tokens : {1, 8, 9, 17}) {
    expect_layer({.kind = {Gelu, ProductKey, GateKind::Softmax}}, n_tokens);
  }
  for (const std::int64_t d_model : {32, 256, 288, 576}) {
    expect_layer({.kind = {Gelu, LowRank, GateKind::Score}, .d_model = d_model});
  }
  expect_layer({.kind = {Glu, LowRank, GateKind::None},
                .experts = DType::BF16,
                .router = DType::F32,
                .d_model = 68,
                .router_rank = 7,
                .bypass_rank = 0},
               9);
}

TEST_F(Mixture, NoSharedNoActiveNoBypassNoMeans) {
  const kernels::MixtureKind kind{Gelu, FullRank, GateKind::Softmax};
  expect_layer({.kind = kind, .n_shared = 0});
  expect_layer({.kind = kind, .n_active = 0});
  expect_layer({.kind = kind, .n_shared = 0, .n_active = 0, .bypass_rank = 0});
  expect_layer({.kind = kind, .n_experts = 0, .n_active = 0});
  expect_layer({.kind = kind, .bypass_rank = 0});
  expect_layer({.kind = kind, .means = false});
}

TEST_F(Mixture, KEqualsNExpertsAndOne) {
  for (const auto router : {LowRank, ProductKey}) {
    expect_layer({.kind = {Glu, router, GateKind::Softmax}, .n_active = 36});
    expect_layer({.kind = {Glu, router, GateKind::Softmax}, .n_active = 1});
  }
}

TEST_F(Mixture, TiesPickLowestId) {
  for (const auto router : {LowRank, ProductKey}) {
    const MixtureLayer host({.kind = {Linear, router, GateKind::Score}});
    DeviceMixture layer(host, stream);
    zero_bytes(const_cast<std::byte*>(layer.view.router_u.data), size(layer.view.router_u.bytes()),
               stream);
    const auto ones = on_device(std::vector<float>(layer.view.router_bias.size(), 1.0f), stream);
    layer.view.router_bias = {ones.data(), ones.size()};
    const MixtureResult found = run(layer, normal_values(3 * 96, 21));
    for (std::size_t i = 0; i < found.ids.size(); ++i) {
      EXPECT_EQ(found.ids[i], static_cast<std::int32_t>(i % 7));
    }
  }
}

TEST_F(Mixture, NamesTheShapes) {
  const MixtureLayer host({.kind = {Glu, ProductKey, GateKind::None}, .router = DType::F32});
  const DeviceMixture layer(host, stream);
  const DeviceMatrix x(2, 96), three(3, 96);
  EXPECT_THROW(mixture(layer.view, three.view(), x.view(), nullptr, nullptr, nullptr, stream),
               ShapeError);
  const MixtureLayer odd(
      {.kind = {Glu, ProductKey, GateKind::None}, .router = DType::F32, .router_rank = 6});
  EXPECT_THROW(mixture(odd.view, x.view(), x.view(), nullptr, nullptr, nullptr, stream),
               ShapeError);
}

}  // namespace
}  // namespace moesaic::cuda
