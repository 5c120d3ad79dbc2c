#include "kernels/cuda/base/stream.h"

#include "kernels/cuda/base/check.h"

namespace moesaic::cuda {

Stream::Stream() { check(cudaStreamCreateWithFlags(&handle_, cudaStreamNonBlocking), "stream"); }

Stream::~Stream() {
  if (handle_ != nullptr) cudaStreamDestroy(handle_);
}

void Stream::synchronize() const { check(cudaStreamSynchronize(handle_), "stream"); }

}  // namespace moesaic::cuda
