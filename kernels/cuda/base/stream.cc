#include "kernels/cuda/base/stream.h"

#include "kernels/cuda/base/check.h"

namespace moesaic::cuda {

Event::Event() { check(cudaEventCreateWithFlags(&handle_, cudaEventDisableTiming), "event"); }

Event::~Event() {
  if (handle_ != nullptr) cudaEventDestroy(handle_);
}

void Event::record(const Stream& stream) { check(cudaEventRecord(handle_, stream), "event"); }

Stream::Stream() { check(cudaStreamCreateWithFlags(&handle_, cudaStreamNonBlocking), "stream"); }

Stream::~Stream() {
  if (handle_ != nullptr) cudaStreamDestroy(handle_);
}

void Stream::wait(const Event& event) {
  check(cudaStreamWaitEvent(handle_, event.handle(), 0), "stream");
}

void Stream::synchronize() const { check(cudaStreamSynchronize(handle_), "stream"); }

}  // namespace moesaic::cuda
