#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "tests/cudasim/test/device.cuh"

// cuBLAS products against the obvious loops.

namespace cudasim::test {
namespace {

class Blas : public OnDevice {
 protected:
  void SetUp() override { ASSERT_EQ(cublasCreate(&handle_), CUBLAS_STATUS_SUCCESS); }
  void TearDown() override {
    cublasDestroy(handle_);
    OnDevice::TearDown();
  }
  cublasHandle_t handle_ = nullptr;
};

float value(float v) { return v; }
float value(__nv_bfloat16 v) { return __bfloat162float(v); }
float value(__half v) { return __half2float(v); }
template <class T>
T from(float v);
template <>
float from<float>(float v) {
  return v;
}
template <>
__nv_bfloat16 from<__nv_bfloat16>(float v) {
  return __float2bfloat16(v);
}
template <>
__half from<__half>(float v) {
  return __float2half(v);
}
template <class T>
constexpr cudaDataType_t kType = CUDA_R_32F;
template <>
constexpr cudaDataType_t kType<__nv_bfloat16> = CUDA_R_16BF;
template <>
constexpr cudaDataType_t kType<__half> = CUDA_R_16F;
template <class T>
constexpr double kEpsilon = 0x1p-24;
template <>
constexpr double kEpsilon<__nv_bfloat16> = 0x1p-8;  // 8 bits of precision
template <>
constexpr double kEpsilon<__half> = 0x1p-11;

template <class T, class D>
void compare(cublasHandle_t handle, bool ta, bool tb, int m, int n, int k, float alpha,
             float beta) {
  const int lda = (ta ? k : m) + 3, ldb = (tb ? n : k) + 1, ldc = m + 2;
  const auto fill = [](size_t size, unsigned seed, auto t) {
    std::vector<decltype(t)> v(size);
    const auto source = normal(size, seed);
    for (size_t i = 0; i < size; ++i) v[i] = from<decltype(t)>(source[i]);
    return v;
  };
  const auto a = fill(lda * (ta ? m : k), 1, T{}), b = fill(ldb * (tb ? k : n), 2, T{});
  const auto c = fill(ldc * n, 3, D{});
  Buffer<T> da(a), db(b);
  Buffer<D> dc(c);
  ASSERT_EQ(cublasGemmEx(handle, ta ? CUBLAS_OP_T : CUBLAS_OP_N, tb ? CUBLAS_OP_T : CUBLAS_OP_N, m,
                         n, k, &alpha, da, kType<T>, lda, db, kType<T>, ldb, &beta, dc, kType<D>,
                         ldc, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
            CUBLAS_STATUS_SUCCESS);
  const auto got = dc.host();
  for (int j = 0; j < n; ++j) {
    for (int i = 0; i < m; ++i) {
      double sum = 0, size = 0;
      for (int l = 0; l < k; ++l) {
        const double p = double(value(a[ta ? i * lda + l : l * lda + i])) *
                         value(b[tb ? l * ldb + j : j * ldb + l]);
        sum += p;
        size += std::abs(p);
      }
      const double old = value(c[j * ldc + i]);
      const double expected = alpha * sum + beta * old;
      const double tolerance = (k + 4) * 0x1p-24 * (std::abs(alpha) * size + std::abs(beta * old)) +
                               kEpsilon<D> * std::abs(expected) * 1.01;
      EXPECT_NEAR(value(got[j * ldc + i]), expected, tolerance) << i << ' ' << j;
    }
    // What lies between the columns stays.
    if (j + 1 < n) EXPECT_EQ(value(got[j * ldc + m]), value(c[j * ldc + m]));
  }
}

TEST_F(Blas, EqualsTheLoops) {
  for (const bool ta : {false, true}) {
    for (const bool tb : {false, true}) {
      compare<float, float>(handle_, ta, tb, 7, 5, 33, 1, 0);
      compare<__nv_bfloat16, __nv_bfloat16>(handle_, ta, tb, 16, 9, 64, 1, 0);
      compare<__nv_bfloat16, float>(handle_, ta, tb, 3, 17, 20, 0.5f, 2);
      compare<__half, __half>(handle_, ta, tb, 8, 8, 8, -1, 1);
    }
  }
  compare<float, float>(handle_, false, false, 4, 4, 0, 1, 1);
}

TEST_F(Blas, BatchesByStrideAndByPointer) {
  const int m = 4, n = 3, k = 5, batch = 3;
  const auto a = normal(m * k * batch, 4), b = normal(k * n * batch, 5);
  Buffer<float> da(a), db(b), dc(m * n * batch), dp(m * n * batch);
  const float one = 1, zero = 0;
  ASSERT_EQ(cublasSgemmStridedBatched(handle_, CUBLAS_OP_N, CUBLAS_OP_N, m, n, k, &one, da, m,
                                      m * k, db, k, k * n, &zero, dc, m, m * n, batch),
            CUBLAS_STATUS_SUCCESS);
  std::vector<const void*> pa, pb;
  std::vector<void*> pc;
  for (int i = 0; i < batch; ++i) {
    pa.push_back(da.get() + i * m * k);
    pb.push_back(db.get() + i * k * n);
    pc.push_back(dp.get() + i * m * n);
  }
  Buffer<const void*> qa(pa), qb(pb);
  Buffer<void*> qc(pc);
  ASSERT_EQ(cublasGemmBatchedEx(handle_, CUBLAS_OP_N, CUBLAS_OP_N, m, n, k, &one, qa.get(),
                                CUDA_R_32F, m, qb.get(), CUDA_R_32F, k, &zero, qc.get(), CUDA_R_32F,
                                m, batch, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
            CUBLAS_STATUS_SUCCESS);
  const auto c = dc.host(), p = dp.host();
  EXPECT_EQ(c, p);
  double expected = 0;
  for (int l = 0; l < k; ++l)
    expected += double(a[2 * m * k + l * m + 1]) * b[2 * k * n + 2 * k + l];
  EXPECT_NEAR(c[2 * m * n + 2 * m + 1], expected, 1e-5);
}

TEST_F(Blas, OperandsAreChecked) {
  Buffer<float> a(16), b(std::vector<float>(16)), c(16);
  const float one = 1, zero = 0;
  const auto multiply = [&](float* x, int n) {
    cublasSgemm(handle_, CUBLAS_OP_N, CUBLAS_OP_N, 4, n, 4, &one, x, 4, b, 4, &zero, c, 4);
    return take_report();
  };
  EXPECT_TRUE(multiply(a, 4).starts_with("uninitialised-read"));
  EXPECT_EQ(multiply(b, 4), "");
  EXPECT_TRUE(multiply(b, 5).starts_with("out-of-bounds"));
  EXPECT_EQ(cublasSgemm(handle_, CUBLAS_OP_N, CUBLAS_OP_N, 4, 4, 4, &one, b, 3, b, 4, &zero, c, 4),
            CUBLAS_STATUS_INVALID_VALUE);
}

TEST_F(Blas, RunsInStreamsAndGraphs) {
  cudaStream_t s;
  check(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
  cublasSetStream(handle_, s);
  Buffer<float> a(std::vector<float>(16, 1.0f)), c(16);
  const float one = 1, zero = 0;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  check(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
  ASSERT_EQ(cublasSgemm(handle_, CUBLAS_OP_N, CUBLAS_OP_N, 4, 4, 4, &one, a, 4, a, 4, &zero, c, 4),
            CUBLAS_STATUS_SUCCESS);
  check(cudaMemcpyAsync(a, c, 64, cudaMemcpyDeviceToDevice, s));
  check(cudaStreamEndCapture(s, &graph));
  check(cudaGraphInstantiate(&exec, graph, 0));
  check(cudaGraphLaunch(exec, s));
  check(cudaGraphLaunch(exec, s));
  check(cudaStreamSynchronize(s));
  EXPECT_EQ(c.host()[0], 64.0f);
  check(cudaGraphExecDestroy(exec));
  check(cudaGraphDestroy(graph));
  check(cudaStreamDestroy(s));
}

}  // namespace
}  // namespace cudasim::test
