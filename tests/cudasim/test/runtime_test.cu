#include <atomic>
#include <cstring>
#include <thread>

#include "tests/cudasim/test/device.cuh"

// The runtime API, and work on streams that comes as late as the program allows.

namespace cudasim::test {
namespace {

class RuntimeApi : public OnDevice {};

__global__ void fill(int* x, int value, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = value;
}
__global__ void add(const int* x, int* y, int value, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] + value;
}
__global__ void __launch_bounds__(128) bounded(int* x) { x[threadIdx.x] = 1; }

struct Stream {
  cudaStream_t s = nullptr;
  Stream() { check(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(s); }
  operator cudaStream_t() const { return s; }
};
struct Event {
  cudaEvent_t e = nullptr;
  Event() { check(cudaEventCreate(&e)); }
  ~Event() { cudaEventDestroy(e); }
  operator cudaEvent_t() const { return e; }
};

TEST_F(RuntimeApi, DeviceProperties) {
  int n = 0;
  check(cudaGetDeviceCount(&n));
  EXPECT_GE(n, 1);
  cudaDeviceProp p;
  check(cudaGetDeviceProperties(&p, 0));
  EXPECT_EQ(p.warpSize, 32);
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  EXPECT_EQ(major, p.major);
  EXPECT_EQ(cudaSetDevice(n), cudaErrorInvalidDevice);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidDevice);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  EXPECT_STREQ(cudaGetErrorName(cudaErrorIllegalAddress), "cudaErrorIllegalAddress");
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total));
  void* x = nullptr;
  check(cudaMalloc(&x, 1 << 20));
  size_t less = 0;
  check(cudaMemGetInfo(&less, &total));
  EXPECT_EQ(free - less, size_t{1} << 20);
  EXPECT_EQ(cudaMalloc(&x, total), cudaErrorMemoryAllocation);
  cudaGetLastError();
  cudaPointerAttributes a;
  Buffer<int> y(4);
  check(cudaPointerGetAttributes(&a, y.get() + 1));
  EXPECT_EQ(a.type, cudaMemoryTypeDevice);
  check(cudaPointerGetAttributes(&a, &n));
  EXPECT_EQ(a.type, cudaMemoryTypeUnregistered);
  check(cudaDeviceSynchronize());
}

TEST_F(RuntimeApi, LaunchesAreChecked) {
  Buffer<int> x(1024);
  fill<<<1, 1025>>>(x, 0, 1);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidConfiguration);
  bounded<<<1, 129>>>(x);
  EXPECT_EQ(cudaGetLastError(), cudaErrorLaunchOutOfResources);
  fill<<<1, 32, 49 << 10>>>(x, 0, 1);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidValue);
  check(cudaFuncSetAttribute(fill, cudaFuncAttributeMaxDynamicSharedMemorySize, 49 << 10));
  fill<<<1, 32, 49 << 10>>>(x, 0, 1);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  EXPECT_EQ(cudaFuncSetAttribute(fill, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 20),
            cudaErrorInvalidValue);
  cudaGetLastError();
  cudaFuncAttributes a;
  check(cudaFuncGetAttributes(&a, bounded));
  EXPECT_EQ(a.maxThreadsPerBlock, 128);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, fill, 256, 0));
  EXPECT_EQ(blocks, 8);
  cudaLaunchConfig_t config = {};
  config.gridDim = config.blockDim = dim3(2);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {2, 1, 1};
  config.attrs = &cluster;
  config.numAttrs = 1;
  EXPECT_EQ(cudaLaunchKernelEx(&config, fill, x.get(), 1, 2), cudaErrorNotSupported);
  cudaGetLastError();
  config.numAttrs = 0;
  check(cudaLaunchKernelEx(&config, fill, x.get(), 1, 2));
}

TEST_F(RuntimeApi, CopiesAndSets) {
  std::vector<int> h(12);
  for (int i = 0; i < 12; ++i) h[i] = i;
  Buffer<int> x(h), y(64);
  check(cudaMemset(y, 0, 256));
  // 3 rows of 2 ints, out of rows of 4, into rows of 8.
  check(cudaMemcpy2D(y, 32, x, 16, 8, 3, cudaMemcpyDeviceToDevice));
  const auto r = y.host();
  EXPECT_EQ(r[0], 0);
  EXPECT_EQ(r[9], 5);
  EXPECT_EQ(r[16], 8);
  EXPECT_EQ(r[2], 0);
  EXPECT_EQ(cudaMemcpy(h.data(), x, 48, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  cudaGetLastError();
  EXPECT_EQ(cudaFree(x.get() + 1), cudaErrorInvalidValue);
  cudaGetLastError();
  // Copies are checked as kernels are.
  cudaMemcpyAsync(y, x, 256, cudaMemcpyDeviceToDevice, nullptr);
  EXPECT_TRUE(take_report().starts_with("out-of-bounds"));
}

// A missing event: what the other stream reads has not been written.
TEST_F(RuntimeApi, MissingDependencyIsDetected) {
  const int n = 256;
  for (const bool waits : {true, false}) {
    Buffer<int> x(n), y(n);
    Stream first, second;
    Event ready;
    fill<<<1, n, 0, first>>>(x, 7, n);
    check(cudaEventRecord(ready, first));
    if (waits) check(cudaStreamWaitEvent(second, ready, 0));
    add<<<1, n, 0, second>>>(x, y, 1, n);
    const cudaError_t e = cudaStreamSynchronize(second);
    if (waits) EXPECT_EQ(e, cudaSuccess);
    if (waits) EXPECT_EQ(y.host()[n - 1], 8);
    const std::string report = take_report();
    // Schedules other than 0 may happen to run it in time, as a device may.
    const char* schedule = std::getenv("CUDASIM_SCHEDULE");
    const bool late = schedule == nullptr || std::strcmp(schedule, "0") == 0;
    if (waits)
      EXPECT_EQ(report, "");
    else if (late)
      EXPECT_TRUE(report.starts_with("uninitialised-read")) << report;
  }
}

TEST_F(RuntimeApi, HostBuffersAreUsedWhenTheCopyRuns) {
  const char* schedule = std::getenv("CUDASIM_SCHEDULE");
  if (schedule != nullptr && std::strcmp(schedule, "0") != 0)
    GTEST_SKIP() << "schedule 0 alone is late";
  int* pinned = nullptr;
  check(cudaMallocHost(&pinned, 4));
  *pinned = 1;
  Buffer<int> x(1);
  Stream s;
  check(cudaMemcpyAsync(x, pinned, 4, cudaMemcpyHostToDevice, s));
  *pinned = 2;  // too early
  check(cudaStreamSynchronize(s));
  EXPECT_EQ(x.host()[0], 2);
  *pinned = 3;
  check(cudaMemcpyAsync(pinned, x, 4, cudaMemcpyDeviceToHost, s));
  EXPECT_EQ(*pinned, 3);  // nothing has been waited for
  check(cudaStreamSynchronize(s));
  EXPECT_EQ(*pinned, 2);
  check(cudaFreeHost(pinned));
}

TEST_F(RuntimeApi, LegacyStreamSynchronisesWithBlockingOnes) {
  Buffer<int> x(32), y(32);
  cudaStream_t s;
  check(cudaStreamCreate(&s));
  fill<<<1, 32, 0, s>>>(x, 1, 32);
  add<<<1, 32>>>(x, y, 1, 32);
  add<<<1, 32, 0, s>>>(y, x, 1, 32);
  check(cudaStreamSynchronize(s));
  EXPECT_EQ(x.host()[5], 3);
  check(cudaStreamDestroy(s));
}

TEST_F(RuntimeApi, EventsTimeAndQuery) {
  Buffer<int> x(1 << 16);
  Stream s;
  Event a, b;
  check(cudaEventRecord(a, s));
  fill<<<256, 256, 0, s>>>(x, 1, 1 << 16);
  check(cudaEventRecord(b, s));
  int queries = 0;
  cudaError_t e;
  while ((e = cudaEventQuery(b)) == cudaErrorNotReady) ++queries;
  check(e);
  cudaGetLastError();
  float ms = -1;
  check(cudaEventElapsedTime(&ms, a, b));
  EXPECT_GT(ms, 0);
  check(cudaStreamSynchronize(s));
}

TEST_F(RuntimeApi, StreamOrderedMemory) {
  Stream s, other;
  int* x = nullptr;
  check(cudaMallocAsync(&x, 128, s));
  fill<<<1, 32, 0, s>>>(x, 5, 32);
  Buffer<int> y(32);
  add<<<1, 32, 0, s>>>(x, y, 1, 32);
  check(cudaFreeAsync(x, s));
  check(cudaStreamSynchronize(s));
  EXPECT_EQ(y.host()[31], 6);
  add<<<1, 32, 0, other>>>(x, y, 1, 32);
  EXPECT_TRUE(take_report().starts_with("use-after-free"));
}

TEST_F(RuntimeApi, HostFunctionsRunInOrder) {
  Stream s;
  Buffer<int> x(32);
  struct Seen {
    int* x;
    int value = 0;
  } seen{x, 0};
  fill<<<1, 32, 0, s>>>(x, 9, 32);
  check(cudaLaunchHostFunc(
      s, [](void* p) { static_cast<Seen*>(p)->value = 1; }, &seen));
  check(cudaStreamSynchronize(s));
  EXPECT_EQ(seen.value, 1);
}

TEST_F(RuntimeApi, GraphOfTwoStreams) {
  const int n = 64;
  Buffer<int> x(n), y(n), z(n);
  Stream s, side;
  Event fork, join;
  cudaGraph_t graph;
  check(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
  fill<<<1, n, 0, s>>>(x, 3, n);
  check(cudaEventRecord(fork, s));
  check(cudaStreamWaitEvent(side, fork, 0));
  add<<<1, n, 0, side>>>(x, y, 10, n);
  add<<<1, n, 0, s>>>(x, z, 20, n);
  check(cudaEventRecord(join, side));
  check(cudaStreamWaitEvent(s, join, 0));
  add<<<1, n, 0, s>>>(y, x, 100, n);
  void* nothing = nullptr;
  EXPECT_EQ(cudaMalloc(&nothing, 16), cudaErrorStreamCaptureUnsupported);
  cudaGetLastError();
  check(cudaStreamEndCapture(s, &graph));
  size_t nodes = 0;
  check(cudaGraphGetNodes(graph, nullptr, &nodes));
  EXPECT_EQ(nodes, 4u);
  cudaGraphExec_t exec;
  check(cudaGraphInstantiate(&exec, graph, 0));
  check(cudaGraphLaunch(exec, s));
  check(cudaGraphLaunch(exec, s));
  check(cudaStreamSynchronize(s));
  EXPECT_EQ(x.host()[0], 113);
  EXPECT_EQ(z.host()[0], 23);
  // The same shape with other numbers.
  cudaGraph_t other;
  check(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
  fill<<<1, n, 0, s>>>(x, 4, n);
  check(cudaEventRecord(fork, s));
  check(cudaStreamWaitEvent(side, fork, 0));
  add<<<1, n, 0, side>>>(x, y, 10, n);
  add<<<1, n, 0, s>>>(x, z, 20, n);
  check(cudaEventRecord(join, side));
  check(cudaStreamWaitEvent(s, join, 0));
  add<<<1, n, 0, s>>>(y, x, 100, n);
  check(cudaStreamEndCapture(s, &other));
  cudaGraphExecUpdateResultInfo info;
  check(cudaGraphExecUpdate(exec, other, &info));
  check(cudaGraphLaunch(exec, s));
  check(cudaStreamSynchronize(s));
  EXPECT_EQ(x.host()[0], 114);
  cudaGraph_t shorter;
  check(cudaStreamBeginCapture(s, cudaStreamCaptureModeRelaxed));
  fill<<<1, n, 0, s>>>(x, 4, n);
  check(cudaStreamEndCapture(s, &shorter));
  EXPECT_EQ(cudaGraphExecUpdate(exec, shorter, &info), cudaErrorGraphExecUpdateFailure);
  cudaGetLastError();
  for (cudaGraph_t g : {graph, other, shorter}) check(cudaGraphDestroy(g));
  check(cudaGraphExecDestroy(exec));
}

TEST_F(RuntimeApi, CaptureErrors) {
  Buffer<int> x(32);
  Stream s, side;
  Event fork;
  cudaGraph_t graph;
  check(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
  fill<<<1, 32, 0, s>>>(x, 1, 32);
  check(cudaEventRecord(fork, s));
  check(cudaStreamWaitEvent(side, fork, 0));
  fill<<<1, 32, 0, side>>>(x, 2, 32);
  EXPECT_EQ(cudaStreamEndCapture(s, &graph), cudaErrorStreamCaptureUnjoined);
  check(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
  EXPECT_EQ(cudaStreamSynchronize(s), cudaErrorStreamCaptureUnsupported);
  EXPECT_EQ(cudaStreamEndCapture(s, &graph), cudaErrorStreamCaptureInvalidated);
  cudaGetLastError();
}

TEST_F(RuntimeApi, ExplicitGraph) {
  Buffer<int> x(32), y(32);
  int value = 6, n = 32;
  int *px = x, *py = y;
  cudaGraph_t graph;
  check(cudaGraphCreate(&graph, 0));
  void* fill_args[] = {&px, &value, &n};
  cudaKernelNodeParams p = {};
  p.func = reinterpret_cast<void*>(fill);
  p.gridDim = dim3(1);
  p.blockDim = dim3(32);
  p.kernelParams = fill_args;
  cudaGraphNode_t first, second;
  check(cudaGraphAddKernelNode(&first, graph, nullptr, 0, &p));
  check(cudaGraphAddMemcpyNode1D(&second, graph, &first, 1, py, px, 128, cudaMemcpyDeviceToDevice));
  cudaGraphExec_t exec;
  check(cudaGraphInstantiate(&exec, graph, 0));
  check(cudaGraphLaunch(exec, nullptr));
  EXPECT_EQ(y.host()[0], 6);
  value = 7;
  check(cudaGraphExecKernelNodeSetParams(exec, first, &p));
  check(cudaGraphLaunch(exec, nullptr));
  EXPECT_EQ(y.host()[31], 7);
  check(cudaGraphExecDestroy(exec));
  check(cudaGraphDestroy(graph));
}

TEST_F(RuntimeApi, SeveralHostThreads) {
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      Stream s;
      Buffer<int> x(256);
      for (int round = 0; round < 10; ++round) {
        fill<<<1, 256, 0, s>>>(x, t * 100 + round, 256);
        std::vector<int> h(256);
        cudaMemcpyAsync(h.data(), x, 1024, cudaMemcpyDeviceToHost, s);
        cudaStreamSynchronize(s);
        if (h[255] != t * 100 + round) ++wrong;
      }
    });
  }
  for (auto& t : threads) t.join();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace cudasim::test
