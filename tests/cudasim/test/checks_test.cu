#include <cuda_pipeline.h>

#include <cassert>

#include "tests/cudasim/test/device.cuh"

// Every checker is silent for the right program and fires for the same program with one defect.

namespace cudasim::test {
namespace {

template <class Launch>
std::string report_of(Launch launch) {
  launch();
  return take_report();
}

// `finding`: one name, or several that the order of execution decides between: "a|b".
void expect_finding(const std::string& report, const std::string& finding,
                    const std::string& says = "") {
  const std::string name = report.substr(0, report.find(':'));
  EXPECT_NE(("|" + finding + "|").find("|" + name + "|"), std::string::npos) << report;
  EXPECT_NE(report.find(says), std::string::npos) << report;
  EXPECT_NE(report.find("PTX line"), std::string::npos) << report;
  EXPECT_NE(report.find("checks_test.cu:"), std::string::npos) << report;
}

class Checks : public OnDevice {};

__global__ void copy_n(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i];
}

TEST_F(Checks, OutOfBounds) {
  Buffer<float> x(std::vector<float>(100)), y(100);
  EXPECT_EQ(report_of([&] { copy_n<<<4, 32>>>(x, y, 100); }), "");
  expect_finding(report_of([&] { copy_n<<<4, 32>>>(x, y, 101); }), "out-of-bounds",
                 "0 bytes past the end of cudaMalloc");
  expect_finding(report_of([&] { copy_n<<<4, 32>>>(x, nullptr, 100); }), "out-of-bounds",
                 "no device memory");
  std::vector<float> host(100);
  expect_finding(report_of([&] { copy_n<<<4, 32>>>(host.data(), y, 100); }), "out-of-bounds");
  expect_finding(report_of([&] { copy_n<<<4, 32>>>(x - 1, y, 100); }), "out-of-bounds", "before");
}

TEST_F(Checks, FaultLeavesTheContextLost) {
  Buffer<float> x(std::vector<float>(32)), y(32);
  copy_n<<<2, 32>>>(x, y, 33);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorIllegalAddress);
  EXPECT_EQ(cudaGetLastError(), cudaErrorIllegalAddress);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorIllegalAddress);
  expect_finding(take_report(), "out-of-bounds", "thread (0,0,0) of (32,1,1)");
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

TEST_F(Checks, UseAfterFree) {
  Buffer<float> y(32);
  float* x = nullptr;
  check(cudaMalloc(&x, 128));
  check(cudaMemset(x, 0, 128));
  EXPECT_EQ(report_of([&] { copy_n<<<1, 32>>>(x, y, 32); }), "");
  check(cudaFree(x));
  expect_finding(report_of([&] { copy_n<<<1, 32>>>(x, y, 32); }), "use-after-free",
                 "freed cudaMalloc");
}

TEST_F(Checks, UninitialisedDeviceMemory) {
  Buffer<float> x(64), y(64);
  check(cudaMemset(x, 0, 63 * 4));
  EXPECT_EQ(report_of([&] { copy_n<<<2, 32>>>(x, y, 63); }), "");
  expect_finding(report_of([&] { copy_n<<<2, 32>>>(x, y, 64); }), "uninitialised-read",
                 "byte 252 of cudaMalloc");
  // Copies carry the state along.
  Buffer<float> z(64);
  check(cudaMemcpy(z, x, 256, cudaMemcpyDeviceToDevice));
  expect_finding(report_of([&] { copy_n<<<2, 32>>>(z, y, 64); }), "uninitialised-read");
}

template <int Bug>
__global__ void shared_sum(const float* x, float* y) {
  __shared__ float s[64];
  __shared__ float other[4];
  const int i = threadIdx.x;
  if (Bug != 1 || i != 40) s[i] = x[i];
  if (i < 4) other[i] = 0;
  if (Bug != 2) __syncthreads();
  float v = s[63 - i];
  if (Bug == 3 && i == 0) v += s[64];
  if (Bug == 4) __syncwarp();
  if (Bug != 4) __syncthreads();
  s[i] = v;
  __syncthreads();
  y[i] = s[i] + other[i % 4];
}

__global__ void same_values(int* flag) { *flag = 1; }

TEST_F(Checks, EqualValuesFromManyThreadsAreNoRace) {
  Buffer<int> flag(1);
  EXPECT_EQ(report_of([&] { same_values<<<4, 64>>>(flag); }), "");
}

TEST_F(Checks, SharedMemoryDefects) {
  Buffer<float> x(std::vector<float>(64, 1.0f)), y(64);
  EXPECT_EQ(report_of([&] { shared_sum<0><<<1, 64>>>(x, y); }), "");
  expect_finding(report_of([&] { shared_sum<1><<<1, 64>>>(x, y); }), "uninitialised-read",
                 "shared address");
  expect_finding(report_of([&] { shared_sum<2><<<1, 64>>>(x, y); }),
                 "uninitialised-read|shared-race");
  expect_finding(report_of([&] { shared_sum<3><<<1, 64>>>(x, y); }), "out-of-bounds",
                 "between two variables");
  expect_finding(report_of([&] { shared_sum<4><<<1, 64>>>(x, y); }), "shared-race",
                 "a barrier is missing");
}

template <bool Bug>
__global__ void through_the_warp(float* y) {
  __shared__ float s[32];
  s[threadIdx.x] = threadIdx.x;
  if (!Bug) __syncwarp();
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}

TEST_F(Checks, SharedRaceWithinAWarp) {
  Buffer<float> y(32);
  EXPECT_EQ(report_of([&] { through_the_warp<false><<<1, 32>>>(y); }), "");
  expect_finding(report_of([&] { through_the_warp<true><<<1, 32>>>(y); }), "shared-race",
                 "__syncwarp() is missing");
}

__global__ void dynamic_shared(float* y, int n) {
  extern __shared__ float s[];
  s[threadIdx.x] = 1;
  y[threadIdx.x] = s[threadIdx.x];
}

TEST_F(Checks, DynamicSharedMemory) {
  Buffer<float> y(64);
  EXPECT_EQ(report_of([&] { dynamic_shared<<<1, 64, 256>>>(y, 64); }), "");
  expect_finding(report_of([&] { dynamic_shared<<<1, 64, 252>>>(y, 64); }), "out-of-bounds");
}

__global__ void misaligned(const float* x, float4* y) {
  y[threadIdx.x] = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x);
}

TEST_F(Checks, MisalignedVectors) {
  Buffer<float> x(std::vector<float>(200));
  Buffer<float4> y(32);
  EXPECT_EQ(report_of([&] { misaligned<<<1, 32>>>(x, y); }), "");
  expect_finding(report_of([&] { misaligned<<<1, 32>>>(x + 1, y); }), "misaligned",
                 "not a multiple of 16");
}

__global__ void histogram(const int* ids, int* count, bool atomic) {
  const int i = ids[blockIdx.x * blockDim.x + threadIdx.x];
  if (atomic)
    atomicAdd(&count[i], 1);
  else
    count[i] = count[i] + 1;
}

TEST_F(Checks, ScatterWithoutAtomics) {
  std::vector<int> ids(128), one_each(128);
  for (int i = 0; i < 128; ++i) ids[i] = i % 96, one_each[i] = i;
  Buffer<int> same(ids), distinct(one_each), count(std::vector<int>(128));
  EXPECT_EQ(report_of([&] { histogram<<<2, 64>>>(same, count, true); }), "");
  EXPECT_EQ(report_of([&] { histogram<<<2, 64>>>(distinct, count, false); }), "");
  expect_finding(report_of([&] { histogram<<<2, 64>>>(same, count, false); }), "global-race",
                 "of block");
}

__global__ void neighbours(float* x) {
  const int i = threadIdx.x;
  x[i] = i;
  x[i] += x[(i + 32) % 64];
}

TEST_F(Checks, GlobalRaceWithinABlock) {
  Buffer<float> x(64);
  expect_finding(report_of([&] { neighbours<<<1, 64>>>(x); }), "global-race|uninitialised-read");
  Buffer<float> y(std::vector<float>(64));
  expect_finding(report_of([&] { neighbours<<<1, 64>>>(y); }), "global-race",
                 "a barrier is missing");
}

// Flags between blocks: with and without the fence that publishes the data.
template <bool Fence>
__global__ void hand_over(int* data, int* flag, int* out) {
  if (threadIdx.x != 0) return;
  if (atomicAdd(flag, 0) == 0 && blockIdx.x == 0) {
    *data = 42;
    if (Fence) __threadfence();
    atomicExch(flag, 1);
  } else {
    if (atomicAdd(flag, 0) == 1) *out = *data;
  }
}

TEST_F(Checks, PublishingNeedsAFence) {
  for (const bool fence : {true, false}) {
    Buffer<int> data(1), flag(std::vector<int>{0}), out(1);
    const std::string report = report_of([&] {
      if (fence)
        hand_over<true><<<64, 32>>>(data, flag, out);
      else
        hand_over<false><<<64, 32>>>(data, flag, out);
    });
    // Under a schedule in which block 0 comes last there is nobody to hand over to.
    if (fence)
      EXPECT_EQ(report, "");
    else if (!report.empty())
      expect_finding(report, "global-race", "of block");
  }
}

template <int Bug>
__global__ void staged(const float4* x, float4* y) {
  __shared__ float4 s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 16);
  if (Bug != 1) __pipeline_commit();
  if (Bug != 2) __pipeline_wait_prior(0);
  if (Bug == 3)
    __syncwarp();
  else
    __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];
}

TEST_F(Checks, AsyncCopies) {
  Buffer<float4> x(std::vector<float4>(65)), y(64);
  EXPECT_EQ(report_of([&] { staged<0><<<1, 64>>>(x, y); }), "");
  expect_finding(report_of([&] { staged<1><<<1, 64>>>(x, y); }),
                 "async-copy-race|uninitialised-read");
  expect_finding(report_of([&] { staged<2><<<1, 64>>>(x, y); }),
                 "async-copy-race|uninitialised-read");
  expect_finding(report_of([&] { staged<3><<<1, 64>>>(x, y); }),
                 "shared-race|uninitialised-read|async-copy-race");
  const auto* odd = reinterpret_cast<const float4*>(reinterpret_cast<const char*>(x.get()) + 4);
  expect_finding(report_of([&] { staged<0><<<1, 64>>>(odd, y); }), "misaligned", "cp.async");
}

// A buffer is filled again while another warp may still read it.
template <bool Bug>
__global__ void two_rounds(const float4* x, float4* y) {
  __shared__ float4 s[64];
  for (int round = 0; round < 2; ++round) {
    __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 16);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    y[64 * round + threadIdx.x] = s[(threadIdx.x + 32) % 64];
    if (!Bug) __syncthreads();
  }
}

TEST_F(Checks, AsyncCopyIntoABufferStillRead) {
  Buffer<float4> x(std::vector<float4>(64)), y(128);
  EXPECT_EQ(report_of([&] { two_rounds<false><<<1, 64>>>(x, y); }), "");
  expect_finding(report_of([&] { two_rounds<true><<<1, 64>>>(x, y); }), "shared-race", "read");
}

template <int Bug>
__global__ void reduce(float* y, int n) {
  float v = threadIdx.x;
  const unsigned mask = Bug == 1 ? 0xffffu : ~0u;
  if (Bug == 2 && threadIdx.x >= 24) return;
  if (Bug == 3 && threadIdx.x >= 16) {
    y[threadIdx.x] = 0;
  } else {
    for (int o = 16; o > 0; o /= 2) v += __shfl_xor_sync(mask, v, o);
    y[threadIdx.x] = v;
  }
}

TEST_F(Checks, ShuffleMasks) {
  Buffer<float> y(32);
  EXPECT_EQ(report_of([&] { reduce<0><<<1, 32>>>(y, 32); }), "");
  expect_finding(report_of([&] { reduce<1><<<1, 32>>>(y, 32); }), "warp-mask", "lacks the lane");
  expect_finding(report_of([&] { reduce<2><<<1, 32>>>(y, 32); }), "warp-mask", "exit instead");
  expect_finding(report_of([&] { reduce<3><<<1, 32>>>(y, 32); }), "warp-mask", "never come");
}

__global__ void half_the_block(int* y) {
  if (threadIdx.x < 32) {
    __syncthreads();
    y[threadIdx.x] = 1;
  } else {
    y[threadIdx.x] = 2;
    __syncthreads();
    y[threadIdx.x] += 1;
  }
}
__global__ void half_a_warp(int* y) {
  if (threadIdx.x % 32 < 16) __syncthreads();
  y[threadIdx.x] = 1;
}

TEST_F(Checks, BarrierDivergence) {
  Buffer<int> y(64);
  expect_finding(report_of([&] { half_the_block<<<1, 64>>>(y); }), "barrier-divergence");
  expect_finding(report_of([&] { half_a_warp<<<1, 64>>>(y); }), "barrier-divergence");
}

__global__ void read_only(const float* __restrict__ x, float* y) {
  y[threadIdx.x] = 1;
  y[threadIdx.x + 32] = __ldg(&x[threadIdx.x]);
}

TEST_F(Checks, ReadOnlyLoadOfWhatTheKernelWrites) {
  Buffer<float> x(std::vector<float>(64)), y(64);
  EXPECT_EQ(report_of([&] { read_only<<<1, 32>>>(x, y); }), "");
  expect_finding(report_of([&] { read_only<<<1, 32>>>(y, y); }), "read-only-written");
}

__global__ void asserts(int n) { assert(threadIdx.x < n && "too many threads"); }

TEST_F(Checks, Assertions) {
  EXPECT_EQ(report_of([] { asserts<<<1, 32>>>(32); }), "");
  asserts<<<1, 32>>>(31);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorAssert);
  expect_finding(take_report(), "assertion", "too many threads");
}

TEST_F(Checks, ArenaRegions) {
  float* arena = nullptr;
  check(cudaMalloc(&arena, 4096));
  cudasim_suballocate(arena);
  cudasim_region(arena, 128, 1);
  cudasim_region(arena + 256, 128, 1);
  check(cudaMemset(arena, 0, 128));
  EXPECT_EQ(report_of([&] { copy_n<<<1, 32>>>(arena, arena + 256, 32); }), "");
  expect_finding(report_of([&] { copy_n<<<2, 32>>>(arena, arena + 256, 33); }), "out-of-bounds");
  cudasim_region(arena, 128, 0);
  expect_finding(report_of([&] { copy_n<<<1, 32>>>(arena, arena + 256, 32); }), "use-after-free");
  check(cudaFree(arena));
}

}  // namespace
}  // namespace cudasim::test
