#pragma once

#include "converter/device_distillation.h"

namespace moesaic::converter {

/// Distillation on GPU `device`: a layer's sample, its student, gradients and Adam's moments are in
/// device memory for as long as it takes, products are cuBLAS's in float32, all else our own
/// kernels. Some steps are queued at a time and waited for once, for their loss. Deterministic.
/// Making one throws DeviceError (no GPU, no cuBLAS), distilling DeviceError (no memory) and
/// ShapeError (a sample with gaps between its rows).
MakeDeviceDistillation cuda_distillation(int device);

}  // namespace moesaic::converter
