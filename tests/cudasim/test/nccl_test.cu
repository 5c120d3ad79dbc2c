#include <nccl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>

#include "tests/cudasim/test/device.cuh"

namespace cudasim::test {
namespace {

class Nccl : public OnDevice {
 protected:
  void SetUp() override {
    int n = 0;
    check(cudaGetDeviceCount(&n));
    if (n < 3) GTEST_SKIP() << "needs CUDASIM_DEVICES=3";
  }
  void TearDown() override {
    cudaSetDevice(0);
    OnDevice::TearDown();
  }
};

TEST_F(Nccl, SeveralDevicesOfOneProcess) {
  constexpr int kRanks = 3, kCount = 6;
  ncclComm_t comms[kRanks];
  ASSERT_EQ(ncclCommInitAll(comms, kRanks, nullptr), ncclSuccess);
  cudaStream_t streams[kRanks];
  float *in[kRanks], *out[kRanks];
  for (int r = 0; r < kRanks; ++r) {
    check(cudaSetDevice(r));
    check(cudaStreamCreateWithFlags(&streams[r], cudaStreamNonBlocking));
    check(cudaMalloc(&in[r], kCount * 4));
    check(cudaMalloc(&out[r], kRanks * kCount * 4));
    std::vector<float> h(kCount);
    for (int i = 0; i < kCount; ++i) h[i] = 10.0f * r + i;
    check(cudaMemcpy(in[r], h.data(), kCount * 4, cudaMemcpyHostToDevice));
  }
  const auto result = [&](int r, int n) {
    cudaSetDevice(r);
    cudaStreamSynchronize(streams[r]);
    std::vector<float> h(n);
    cudaMemcpy(h.data(), out[r], n * 4, cudaMemcpyDeviceToHost);
    return h;
  };
  const auto in_group = [&](auto f) {
    ASSERT_EQ(ncclGroupStart(), ncclSuccess);
    for (int r = 0; r < kRanks; ++r) ASSERT_EQ(f(r), ncclSuccess);
    ASSERT_EQ(ncclGroupEnd(), ncclSuccess);
  };
  in_group([&](int r) {
    return ncclAllReduce(in[r], out[r], kCount, ncclFloat, ncclSum, comms[r], streams[r]);
  });
  for (int r = 0; r < kRanks; ++r) EXPECT_EQ(result(r, kCount)[5], 30.0f + 15.0f);
  in_group([&](int r) {
    return ncclAllReduce(in[r], out[r], kCount, ncclFloat, ncclMax, comms[r], streams[r]);
  });
  EXPECT_EQ(result(1, kCount)[2], 22.0f);
  in_group(
      [&](int r) { return ncclAllGather(in[r], out[r], kCount, ncclFloat, comms[r], streams[r]); });
  for (int r = 0; r < kRanks; ++r) {
    const auto h = result(r, kRanks * kCount);
    for (int i = 0; i < kRanks * kCount; ++i) EXPECT_EQ(h[i], 10.0f * (i / kCount) + i % kCount);
  }
  in_group([&](int r) {
    return ncclReduceScatter(in[r], out[r], 2, ncclFloat, ncclSum, comms[r], streams[r]);
  });
  EXPECT_EQ(result(2, 2)[1], 30.0f + 15.0f);
  in_group([&](int r) {
    return ncclBroadcast(in[r], out[r], kCount, ncclFloat, 1, comms[r], streams[r]);
  });
  EXPECT_EQ(result(0, kCount)[0], 10.0f);
  // Around a ring.
  ASSERT_EQ(ncclGroupStart(), ncclSuccess);
  for (int r = 0; r < kRanks; ++r) {
    ncclSend(in[r], kCount, ncclFloat, (r + 1) % kRanks, comms[r], streams[r]);
    ncclRecv(out[r], kCount, ncclFloat, (r + kRanks - 1) % kRanks, comms[r], streams[r]);
  }
  ASSERT_EQ(ncclGroupEnd(), ncclSuccess);
  for (int r = 0; r < kRanks; ++r) EXPECT_EQ(result(r, 1)[0], 10.0f * ((r + kRanks - 1) % kRanks));
  EXPECT_EQ(take_report(), "");
  // Ranks that call different things.
  ASSERT_EQ(ncclGroupStart(), ncclSuccess);
  for (int r = 0; r < kRanks; ++r) {
    ncclAllReduce(in[r], out[r], r == 2 ? kCount - 1 : kCount, ncclFloat, ncclSum, comms[r],
                  streams[r]);
  }
  ncclGroupEnd();  // other schedules may notice here
  cudaSetDevice(0);
  EXPECT_NE(cudaStreamSynchronize(streams[0]), cudaSuccess);
  const std::string report = take_report();
  EXPECT_NE(report.find("mismatched calls"), std::string::npos) << report;
  EXPECT_NE(report.find("count 5"), std::string::npos) << report;
  ncclResult_t async = ncclSuccess;
  int failed = 0;
  for (int r = 0; r < kRanks; ++r) {
    EXPECT_EQ(ncclCommGetAsyncError(comms[r], &async), ncclSuccess);
    failed += async == ncclRemoteError;
  }
  EXPECT_GE(failed, 1);
  for (int r = 0; r < kRanks; ++r) {
    cudaSetDevice(r);
    cudaDeviceSynchronize();
    char text[16];
    while (cudasim_take_report(text, sizeof text) > 0) {
    }
    ncclCommAbort(comms[r]);
    cudaFree(in[r]);
    cudaFree(out[r]);
    cudaStreamDestroy(streams[r]);
  }
}

// One process a rank; what a child finds wrong is its exit status.
int rank_of_process(const ncclUniqueId& id, int rank, int ranks) {
  ncclComm_t comm;
  if (ncclCommInitRank(&comm, ranks, id, rank) != ncclSuccess) return 10;
  const int n = 1000;
  std::vector<float> h(n, rank + 1.0f);
  float* x = nullptr;
  if (cudaMalloc(&x, n * 4) != cudaSuccess) return 11;
  cudaMemcpy(x, h.data(), n * 4, cudaMemcpyHostToDevice);
  for (int round = 0; round < 5; ++round) {
    const ncclResult_t e = ncclAllReduce(x, x, n, ncclFloat, ncclSum, comm, nullptr);
    if (e == ncclSystemError) return 20;
    // Other schedules run the call early: what it finds comes back at once.
    if (e != ncclSuccess || cudaDeviceSynchronize() != cudaSuccess) return 21;
  }
  cudaMemcpy(h.data(), x, n * 4, cudaMemcpyDeviceToHost);
  const float expected = 6.0f * 81;  // 1 + 2 + 3, then threefold four times
  if (h[0] != expected || h[n - 1] != expected) return 13;
  ncclCommDestroy(comm);
  return 0;
}

std::vector<int> run_processes(int ranks) {
  ncclUniqueId id;
  ncclGetUniqueId(&id);
  std::vector<pid_t> children;
  for (int r = 0; r < ranks; ++r) {
    const pid_t pid = fork();
    if (pid == 0) _exit(rank_of_process(id, r, ranks));
    children.push_back(pid);
  }
  std::vector<int> status;
  for (const pid_t pid : children) {
    int s = 0;
    waitpid(pid, &s, 0);
    status.push_back(WIFEXITED(s) ? WEXITSTATUS(s) : -1);
  }
  const std::string folder = "/dev/shm/" + std::string(id.internal);
  [[maybe_unused]] const int ignored = std::system(("rm -rf " + folder).c_str());
  return status;
}

TEST_F(Nccl, SeveralProcesses) { EXPECT_EQ(run_processes(3), (std::vector<int>{0, 0, 0})); }

TEST_F(Nccl, InjectedFailures) {
  setenv("CUDASIM_NCCL_TIMEOUT", "1", 1);
  setenv("CUDASIM_NCCL_FAIL", "1:2:error", 1);
  // The rank that fails leaves; the others wait for it in vain.
  EXPECT_EQ(run_processes(3), (std::vector<int>{21, 20, 21}));
  setenv("CUDASIM_NCCL_FAIL", "2:0:hang", 1);
  EXPECT_EQ(run_processes(3), (std::vector<int>{21, 21, 21}));
  unsetenv("CUDASIM_NCCL_FAIL");
  unsetenv("CUDASIM_NCCL_TIMEOUT");
}

}  // namespace
}  // namespace cudasim::test
