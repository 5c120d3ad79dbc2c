// How fast the stand-in runs: thread instructions a second of three kernels, checkers on.
// cudasim run --counters FILE speed; the sums are in FILE.

#include <cuda_bf16.h>

#include <chrono>
#include <cstdio>
#include <vector>

// y = W x, one warp a row, x staged in shared memory, 16-byte loads.
__global__ void matvec(const uint4* w, const float* x, float* y, int d) {
  extern __shared__ float staged[];
  for (int i = threadIdx.x; i < d; i += blockDim.x) staged[i] = x[i];
  __syncthreads();
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint4* wr = w + static_cast<size_t>(row) * (d / 8);
  float sum = 0;
  for (int i = lane; i < d / 8; i += 32) {
    const uint4 packed = wr[i];
    const auto* pair = reinterpret_cast<const __nv_bfloat162*>(&packed);
    const float4 a = reinterpret_cast<const float4*>(staged)[2 * i];
    const float4 b = reinterpret_cast<const float4*>(staged)[2 * i + 1];
    const float2 p0 = __bfloat1622float2(pair[0]), p1 = __bfloat1622float2(pair[1]);
    const float2 p2 = __bfloat1622float2(pair[2]), p3 = __bfloat1622float2(pair[3]);
    sum += p0.x * a.x + p0.y * a.y + p1.x * a.z + p1.y * a.w;
    sum += p2.x * b.x + p2.y * b.y + p3.x * b.z + p3.y * b.w;
  }
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  if (lane == 0) y[row] = sum;
}

__global__ void axpy(const float* x, float* y, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    y[i] = 2 * x[i] + y[i];
  }
}

__global__ void polynomial(float* y, int rounds) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float v = i * 1e-3f, s = 0;
  for (int r = 0; r < rounds; ++r) {
    s = s * v + 0.5f;
    v = v * 0.99f + 0.01f * s;
    if (v > 2) v -= 1;
  }
  y[i] = s;
}

template <class F>
void timed(const char* name, F f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  cudaDeviceSynchronize();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  std::printf("%s %.3f s\n", name, took.count());
}

int main() {
  const int d = 2048, rows = 4096, n = 1 << 21;
  void *w = nullptr, *x = nullptr, *y = nullptr;
  cudaMalloc(&w, size_t{2} * d * rows);
  cudaMalloc(&x, sizeof(float) * n);
  cudaMalloc(&y, sizeof(float) * n);
  cudaMemset(w, 0, size_t{2} * d * rows);
  cudaMemset(x, 0, sizeof(float) * n);
  cudaMemset(y, 0, sizeof(float) * n);
  cudaDeviceSynchronize();
  timed("matvec", [&] {
    for (int k = 0; k < 4; ++k) {
      matvec<<<rows / 8, 256, d * sizeof(float)>>>(static_cast<uint4*>(w), static_cast<float*>(x),
                                                   static_cast<float*>(y), d);
    }
  });
  timed("axpy", [&] { axpy<<<64, 256>>>(static_cast<float*>(x), static_cast<float*>(y), n); });
  timed("polynomial", [&] { polynomial<<<64, 256>>>(static_cast<float*>(y), 500); });
  cudaFree(w);
  cudaFree(x);
  cudaFree(y);
  return 0;
}
