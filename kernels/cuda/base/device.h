#pragma once

namespace moesaic::cuda {

/// Makes GPU `index` the one that the calling thread's allocations and launches go to. Throws
/// DeviceError: no driver, no GPU, none of that number, one older than sm_80.
void use_device(int index);

/// The first member of what is made on a GPU: those behind it are made there. Throws as
/// use_device().
struct MadeOn {
  explicit MadeOn(int device) : index(device) { use_device(device); }
  int index;
};

}  // namespace moesaic::cuda
