#pragma once

namespace moesaic::cuda {

/// Makes GPU `index` the one that the calling thread's allocations and launches go to. Throws
/// DeviceError: no driver, no GPU, none of that number, one older than sm_80.
void use_device(int index);

}  // namespace moesaic::cuda
