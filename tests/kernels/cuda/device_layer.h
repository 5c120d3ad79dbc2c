#pragma once

#include "kernels/cuda/secret_moe.h"
#include "tests/kernels/cuda/device.h"
#include "tests/kernels/moe_layer.h"

namespace moesaic::cuda {

/// A layer's weights in device memory.
struct DeviceLayer {
  DeviceLayer(const kernels::MoeLayer& host, const Stream& stream)
      : shared(host.shared.view(), stream),
        experts(host.experts.view(), stream),
        router_v(host.router_v.view(), stream),
        router_u(host.router_u.view(), stream),
        bypass_q(host.bypass_q.view(), stream),
        bypass_p(host.bypass_p.view(), stream),
        mean(on_device(host.mean, stream)),
        router_bias(on_device(host.router_bias, stream)),
        bias(on_device(host.bias, stream)),
        view(host.view) {
    view.shared = shared.view();
    view.experts = experts.view();
    view.router_v = router_v.view();
    view.router_u = router_u.view();
    view.bypass_q = bypass_q.view();
    view.bypass_p = bypass_p.view();
    view.expert_mean = {mean.data(), mean.size()};
    view.router_bias = {router_bias.data(), router_bias.size()};
    view.bias = {bias.data(), bias.size()};
  }

  DeviceWeights shared, experts, router_v, router_u, bypass_q, bypass_p;
  DeviceBuffer<float> mean, router_bias, bias;
  kernels::SecretMoeView view;
};

inline DeviceBuffer<std::byte> zeroed_workspace(const DeviceLayer& layer, const Stream& stream) {
  DeviceBuffer<std::byte> workspace(secret_moe_token_workspace(layer.view));
  zero_bytes(workspace.data(), workspace.size(), stream);
  return workspace;
}

}  // namespace moesaic::cuda
