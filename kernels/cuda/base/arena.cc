#include "kernels/cuda/base/arena.h"

#include <dlfcn.h>

#include "kernels/base/error.h"

namespace moesaic::cuda {
namespace {

// The stand-in for the device (docs/cudasim.md) takes an allocation for one tensor unless told of
// its parts; no other runtime has these functions.
template <class Fn>
Fn* hook(const char* name) {
  return reinterpret_cast<Fn*>(dlsym(RTLD_DEFAULT, name));
}

}  // namespace

Arena::Arena(std::size_t bytes) : memory_(padded(bytes)) {
  if (auto* divide = hook<void(const void*)>("cudasim_suballocate"); divide != nullptr) {
    divide(memory_.data());
  }
}

std::byte* Arena::take_bytes(std::size_t bytes) {
  require<DeviceError>(padded(bytes) <= size() - used_,
                       "cuda: arena of {} bytes has {} left, {} needed", size(), size() - used_,
                       padded(bytes));
  std::byte* data = memory_.data() + used_;
  used_ += padded(bytes);
  if (auto* begin = hook<void(const void*, std::size_t, int)>("cudasim_region");
      begin != nullptr && bytes > 0) {
    begin(data, bytes, 1);
  }
  return data;
}

}  // namespace moesaic::cuda
