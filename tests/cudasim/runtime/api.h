#pragma once

#include <cuda_runtime_api.h>

#include <cstdio>
#include <utility>

#include "tests/cudasim/runtime/runtime.h"

namespace cudasim {

/// Runs the body of an API function: under the lock, with what it throws turned into an error code
/// that cudaGetLastError() returns.
template <class F>
cudaError_t call(F f) {
  Runtime& r = Runtime::get();
  const std::lock_guard lock(r.mutex);
  cudaError_t e = cudaSuccess;
  try {
    e = f(r);
  } catch (const Fault& fault) {
    r.report({fault.finding, fmt::format("{}: {}", name_of(fault.finding), fault.text)});
    e = static_cast<cudaError_t>(r.sticky);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cudasim: %s\n", error.what());
    e = cudaErrorUnknown;
  }
  if (e != cudaSuccess) thread_state().last_error = e;
  return e;
}

inline cudaError_t sticky(const Runtime& r) { return static_cast<cudaError_t>(r.sticky); }

/// The stream a handle means; null for a handle that is none.
Stream* stream_of(Runtime& r, cudaStream_t s);

/// Enqueues work, or adds it to the graph that the stream is being captured into.
cudaError_t submit(Runtime& r, cudaStream_t s, Work work);
/// An error if the thread may not call what is unsafe during capture.
cudaError_t not_while_capturing(Runtime& r);

/// Kernel work from a launch, checked as the system checks it.
cudaError_t make_kernel_work(Runtime& r, const void* function, Dim grid, Dim block, void** args,
                             u64 shared, bool cooperative, Work& work);

struct DeviceLimits {
  int shared_per_block_optin;
  int shared_per_multiprocessor;
  int max_threads_per_multiprocessor;
  int max_blocks_per_multiprocessor;
};
DeviceLimits limits_of(int arch);

}  // namespace cudasim

// Opaque handles of cudart.
struct CUevent_st : cudasim::Event {};
struct CUgraph_st : cudasim::Graph {};
struct CUgraphExec_st {
  std::shared_ptr<cudasim::GraphExec> exec;
};
