#pragma once

#include "converter/recovery/device_training.h"
#include "converter/recovery/options.h"

namespace moesaic::converter {

/// Trainings on GPU `device`: products by cuBLAS in bfloat16 with float32 sums, all else by our own
/// kernels; the teacher runs there, too, in the same precision. A step is queued as a whole and
/// waited for once, for its loss and norms. Deterministic. Making one throws DeviceError (no GPU,
/// no memory, no cuBLAS), InputError for layers that it does not know.
MakeDeviceTraining cuda_training(int device);

}  // namespace moesaic::converter
