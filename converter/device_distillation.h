#pragma once

#include <functional>
#include <memory>

#include "converter/distill.h"

namespace moesaic::converter {

/// Distillation of layers on another device, one after the other.
class DeviceDistillation {
 public:
  virtual ~DeviceDistillation() = default;

  /// distill() there: the same batches, the same steps, the same contract, sums in another order.
  virtual void distill(Context& ctx, Student& student, const LayerSample& sample,
                       const DistillOptions& options, engine::Monitor& monitor) = 0;
};

/// Makes it, once for a conversion.
using MakeDeviceDistillation = std::function<std::unique_ptr<DeviceDistillation>()>;

}  // namespace moesaic::converter
