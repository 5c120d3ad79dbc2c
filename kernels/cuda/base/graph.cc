#include "kernels/cuda/base/graph.h"

#include "kernels/cuda/base/check.h"

namespace moesaic::cuda {

void Graph::begin_capture(const Stream& stream) {
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "graph");
}

void Graph::abandon_capture(const Stream& stream) noexcept {
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(stream, &graph);
  if (graph != nullptr) cudaGraphDestroy(graph);
  cudaGetLastError();
}

void Graph::end_capture(const Stream& stream) {
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(stream, &graph), "graph");
  const cudaError_t status = cudaGraphInstantiate(&handle_, graph, 0);
  cudaGraphDestroy(graph);
  check(status, "graph");
}

Graph::~Graph() {
  if (handle_ != nullptr) cudaGraphExecDestroy(handle_);
}

void Graph::launch(const Stream& stream) const { check(cudaGraphLaunch(handle_, stream), "graph"); }

}  // namespace moesaic::cuda
