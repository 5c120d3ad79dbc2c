#pragma once

#include "kernels/cuda/base/column_panels.h"
#include "kernels/cuda/self_routed.h"
#include "tests/kernels/cuda/device.h"
#include "tests/kernels/self_routed_layer.h"

namespace moesaic::cuda {

/// A self-routed layer in device memory, each matrix in the one order that is read.
struct DeviceSelfRouted {
  DeviceSelfRouted(const kernels::SelfRoutedView& host, const Stream& stream)
      : input_threshold(copy(host.input_threshold, stream)),
        gate_threshold(copy(host.gate_threshold, stream)),
        hidden_threshold(copy(host.hidden_threshold, stream)),
        view(host) {
    view.input_threshold = {input_threshold.data(), input_threshold.size()};
    view.gate_threshold = {gate_threshold.data(), gate_threshold.size()};
    view.hidden_threshold = {hidden_threshold.data(), hidden_threshold.size()};
    view.gate_columns = view.up_parts = view.down_columns = nullptr;
    place(reads_gate_by_columns(host), view.w_gate, view.gate_columns, gate, stream);
    place(reads_up_by_columns(host), view.w_up, view.up_parts, up, stream);
    place(reads_down_by_columns(host), view.w_down, view.down_columns, down, stream);
  }

  DeviceBuffer<std::byte> gate, up, down;
  DeviceBuffer<float> input_threshold, gate_threshold, hidden_threshold;
  kernels::SelfRoutedView view;

 private:
  static DeviceBuffer<float> copy(std::span<const float> values, const Stream& stream) {
    return on_device(std::vector<float>(values.begin(), values.end()), stream);
  }
  static void place(bool by_columns, WeightView& w, const std::byte*& columns,
                    DeviceBuffer<std::byte>& buffer, const Stream& stream) {
    std::vector<std::byte> packed(w.data, w.data + w.bytes());
    if (by_columns) {
      packed.resize(size(column_panels(w).bytes()));
      pack_column_panels(w, packed.data());
    }
    buffer = on_device(packed, stream);
    (by_columns ? columns : w.data) = buffer.data();
    if (by_columns) w.data = nullptr;
    w.panels = nullptr;
  }
};

inline DeviceBuffer<std::byte> zeroed_workspace(const DeviceSelfRouted& layer,
                                                const Stream& stream) {
  DeviceBuffer<std::byte> workspace(self_routed_workspace(layer.view));
  zero_bytes(workspace.data(), workspace.size(), stream);
  return workspace;
}

}  // namespace moesaic::cuda
