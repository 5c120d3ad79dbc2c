#pragma once

#include "kernels/cuda/mixture.h"
#include "tests/kernels/cuda/device.h"
#include "tests/kernels/mixture_layer.h"

namespace moesaic::cuda {

/// A layer of the general form in device memory.
struct DeviceMixture {
  DeviceMixture(const kernels::MixtureLayer& host, const Stream& stream) : view(host.view) {
    weights.reserve(6);
    for (WeightView* w : {&view.shared, &view.experts, &view.router_v, &view.router_u,
                          &view.bypass_q, &view.bypass_p}) {
      *w = weights.emplace_back(*w, stream).view();
    }
    values.reserve(5);
    for (std::span<const float>* v :
         {&view.shared_bias, &view.expert_bias, &view.expert_mean, &view.router_bias, &view.bias}) {
      values.push_back(on_device(std::vector<float>(v->begin(), v->end()), stream));
      *v = {values.back().data(), values.back().size()};
    }
  }

  std::vector<DeviceWeights> weights;
  std::vector<DeviceBuffer<float>> values;
  kernels::MixtureView view;
};

}  // namespace moesaic::cuda
