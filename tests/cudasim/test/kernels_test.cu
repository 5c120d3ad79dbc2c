#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "tests/cudasim/test/device.cuh"

// Kernels of the kinds that an inference engine has, compiled by nvcc, against obvious loops.

namespace cudasim::test {
namespace {

namespace cg = cooperative_groups;
using bf16 = __nv_bfloat16;

__constant__ float scale_of[4];
__device__ int call_count;
__device__ float bias_table[4] = {0.5f, -1.0f, 2.0f, 0.25f};

class Kernels : public OnDevice {};

// y = x / rms(x) · w
__global__ void rms_norm(const float* x, const float* w, float* y, int d, float eps) {
  __shared__ float partial[32];
  const float* row = x + static_cast<size_t>(blockIdx.x) * d;
  float sum = 0;
  for (int i = threadIdx.x; i < d; i += blockDim.x) sum += row[i] * row[i];
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0;
    for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    if (threadIdx.x == 0) partial[0] = rsqrtf(sum / d + eps);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < d; i += blockDim.x) {
    y[static_cast<size_t>(blockIdx.x) * d + i] = row[i] * partial[0] * w[i];
  }
}

TEST_F(Kernels, RmsNorm) {
  const int rows = 5, d = 577;
  const auto x = normal(rows * d, 1), w = normal(d, 2);
  Buffer<float> dx(x), dw(w), dy(rows * d);
  rms_norm<<<rows, 128>>>(dx, dw, dy, d, 1e-5f);
  check(cudaDeviceSynchronize());
  const auto y = dy.host();
  for (int r = 0; r < rows; ++r) {
    double sum = 0;
    for (int i = 0; i < d; ++i) sum += double(x[r * d + i]) * x[r * d + i];
    for (int i = 0; i < d; ++i) {
      const double expected = x[r * d + i] / std::sqrt(sum / d + 1e-5) * w[i];
      EXPECT_NEAR(y[r * d + i], expected, 1e-5 * std::abs(expected) + 1e-7);
    }
  }
}

__global__ void rope(float* x, const int* position, int head_dim, float base) {
  float* head = x + static_cast<size_t>(blockIdx.x) * head_dim;
  const int i = threadIdx.x, half = head_dim / 2;
  const float angle = position[blockIdx.x] * powf(base, -2.0f * i / head_dim);
  float s, c;
  sincosf(angle, &s, &c);
  const float a = head[i], b = head[i + half];
  head[i] = a * c - b * s;
  head[i + half] = a * s + b * c;
}

TEST_F(Kernels, RopeWithLargeAngles) {
  // Angles above 105615 take the slow path of sincosf: local memory and a table in constant memory.
  const std::vector<int> position = {0, 1, 511, 200000};
  const int d = 64;
  const auto x = normal(position.size() * d, 3);
  Buffer<float> dx(x);
  Buffer<int> dp(position);
  rope<<<position.size(), d / 2>>>(dx, dp, d, 10000.0f);
  const auto y = dx.host();
  for (size_t p = 0; p < position.size(); ++p) {
    for (int i = 0; i < d / 2; ++i) {
      const float angle = position[p] * std::pow(10000.0f, -2.0f * i / d);
      const double c = std::cos(double(angle)), s = std::sin(double(angle));
      const float a = x[p * d + i], b = x[p * d + i + d / 2];
      // The frequency itself is off by some ulp, which the position multiplies.
      const double tolerance = 1e-5 + 4e-7 * angle;
      EXPECT_NEAR(y[p * d + i], a * c - b * s, tolerance * 4);
      EXPECT_NEAR(y[p * d + i + d / 2], a * s + b * c, tolerance * 4);
    }
  }
}

// C = A Bᵀ, A [M, K], B [N, K] bf16: tiles of 16 × 8 by tensor cores, two stages of cp.async.
__global__ void gemm(const bf16* A, const bf16* B, float* C, int N, int K) {
  constexpr int kStride = 40;
  extern __shared__ __align__(16) bf16 tile[];
  const int lane = threadIdx.x;
  const auto stage = [&](int s) { return tile + s * 24 * kStride; };
  const auto fetch = [&](int s, int k0) {
    for (int i = lane; i < 64; i += 32) {
      __pipeline_memcpy_async(&stage(s)[i / 4 * kStride + i % 4 * 8],
                              &A[(blockIdx.y * 16 + i / 4) * K + k0 + i % 4 * 8], 16);
    }
    __pipeline_memcpy_async(&stage(s)[(16 + lane / 4) * kStride + lane % 4 * 8],
                            &B[(blockIdx.x * 8 + lane / 4) * K + k0 + lane % 4 * 8], 16);
    __pipeline_commit();
  };
  float c[4] = {};
  fetch(0, 0);
  for (int k0 = 0, s = 0; k0 < K; k0 += 32, s ^= 1) {
    if (k0 + 32 < K) {
      fetch(s ^ 1, k0 + 32);
      __pipeline_wait_prior(1);
    } else {
      __pipeline_wait_prior(0);
    }
    __syncthreads();
    for (int kk = 0; kk < 32; kk += 16) {
      unsigned a[4], b[2];
      unsigned at = __cvta_generic_to_shared(&stage(s)[lane % 16 * kStride + kk + lane / 16 * 8]);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                   : "r"(at));
      at = __cvta_generic_to_shared(&stage(s)[(16 + lane % 8) * kStride + kk + lane / 8 % 2 * 8]);
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                   : "=r"(b[0]), "=r"(b[1])
                   : "r"(at));
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
          "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
    __syncthreads();
  }
  const int row = blockIdx.y * 16 + lane / 4, column = blockIdx.x * 8 + lane % 4 * 2;
  *reinterpret_cast<float2*>(&C[row * N + column]) = {c[0], c[1]};
  *reinterpret_cast<float2*>(&C[(row + 8) * N + column]) = {c[2], c[3]};
}

TEST_F(Kernels, TensorCoreGemm) {
  const int M = 48, N = 40, K = 96;
  const auto a = normal(M * K, 4), b = normal(N * K, 5);
  std::vector<bf16> ha(M * K), hb(N * K);
  for (int i = 0; i < M * K; ++i) ha[i] = __float2bfloat16(a[i]);
  for (int i = 0; i < N * K; ++i) hb[i] = __float2bfloat16(b[i]);
  Buffer<bf16> da(ha), db(hb);
  Buffer<float> dc(M * N);
  gemm<<<dim3(N / 8, M / 16), 32, 2 * 24 * 40 * sizeof(bf16)>>>(da, db, dc, N, K);
  check(cudaDeviceSynchronize());
  const auto c = dc.host();
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) {
      double expected = 0, size = 0;
      for (int k = 0; k < K; ++k) {
        const double p = double(__bfloat162float(ha[i * K + k])) * __bfloat162float(hb[j * K + k]);
        expected += p;
        size += std::abs(p);
      }
      EXPECT_NEAR(c[i * N + j], expected, K * 0x1p-24 * size);
    }
  }
}

__global__ void softmax_rows(const float* x, float* y, int n) {
  __shared__ float part[32];
  auto warp = cg::tiled_partition<32>(cg::this_thread_block());
  const int w = threadIdx.x / 32, warps = blockDim.x / 32;
  const float* row = x + static_cast<size_t>(blockIdx.x) * n;
  const auto reduce = [&](float v, auto op) {
    for (int o = 16; o > 0; o /= 2) v = op(v, warp.shfl_xor(v, o));
    if (warp.thread_rank() == 0) part[w] = v;
    __syncthreads();
    v = part[0];
    for (int i = 1; i < warps; ++i) v = op(v, part[i]);
    __syncthreads();
    return v;
  };
  float m = -INFINITY;
  for (int i = threadIdx.x; i < n; i += blockDim.x) m = fmaxf(m, row[i]);
  m = reduce(m, [](float a, float b) { return fmaxf(a, b); });
  float s = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) s += __expf(row[i] - m);
  s = reduce(s, [](float a, float b) { return a + b; });
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    y[static_cast<size_t>(blockIdx.x) * n + i] = __expf(row[i] - m) / s;
  }
}

// The k largest of a row, by one warp: k rounds of a maximum with its index.
__global__ void top_k(const float* x, int n, int k, int* ids) {
  extern __shared__ float row[];
  const int lane = threadIdx.x;
  for (int i = lane; i < n; i += 32) row[i] = x[static_cast<size_t>(blockIdx.x) * n + i];
  __syncwarp();
  for (int r = 0; r < k; ++r) {
    float best = -INFINITY;
    int id = n;
    for (int i = lane; i < n; i += 32) {
      if (row[i] > best) best = row[i], id = i;
    }
    for (int o = 16; o > 0; o /= 2) {
      const float other = __shfl_xor_sync(~0u, best, o);
      const int other_id = __shfl_xor_sync(~0u, id, o);
      if (other > best || (other == best && other_id < id)) best = other, id = other_id;
    }
    __syncwarp();  // shuffles do not order memory
    if (lane == 0) {
      ids[blockIdx.x * k + r] = id;
      row[id] = -INFINITY;
    }
    __syncwarp();
  }
}

TEST_F(Kernels, SoftmaxAndTopK) {
  const int rows = 3, n = 1000, k = 17;
  auto x = normal(rows * n, 6);
  x[5] = x[700] = 9;  // a tie
  Buffer<float> dx(x), dy(rows * n);
  Buffer<int> ids(rows * k);
  softmax_rows<<<rows, 256>>>(dx, dy, n);
  top_k<<<rows, 32, n * sizeof(float)>>>(dx, n, k, ids);
  const auto y = dy.host();
  const auto chosen = ids.host();
  for (int r = 0; r < rows; ++r) {
    double sum = 0;
    for (int i = 0; i < n; ++i) sum += std::exp(double(x[r * n + i]));
    for (int i = 0; i < n; ++i) {
      const double expected = std::exp(double(x[r * n + i])) / sum;
      EXPECT_NEAR(y[r * n + i], expected, 1e-5 * expected);
    }
    std::vector<int> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return x[r * n + a] > x[r * n + b]; });
    for (int i = 0; i < k; ++i) EXPECT_EQ(chosen[r * k + i], order[i]);
  }
}

__device__ float gelu(float v) {
  return 0.5f * v * (1 + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
}

// Gather of k rows, dot with x, GELU, scatter-add of the down rows: one warp an expert.
__global__ void experts(const float* x, const bf16* in, const bf16* out, const int* ids, float* y,
                        int d) {
  const int e = ids[blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32], lane = threadIdx.x % 32;
  const auto* row = reinterpret_cast<const __nv_bfloat162*>(in + static_cast<size_t>(e) * d);
  float dot = 0;
  for (int i = lane; i < d / 2; i += 32) {
    const float2 v = __bfloat1622float2(row[i]);
    dot += v.x * x[2 * i] + v.y * x[2 * i + 1];
  }
  for (int o = 16; o > 0; o /= 2) dot += __shfl_xor_sync(~0u, dot, o);
  const float h = gelu(dot);
  for (int i = lane; i < d; i += 32) {
    atomicAdd(&y[i], h * __bfloat162float(out[static_cast<size_t>(e) * d + i]));
  }
}

TEST_F(Kernels, GatherDotGeluScatter) {
  const int d = 192, n = 300, k = 24;
  const auto x = normal(d, 7), wi = normal(n * d, 8), wo = normal(n * d, 9);
  std::vector<bf16> hi(n * d), ho(n * d);
  for (int i = 0; i < n * d; ++i) {
    hi[i] = __float2bfloat16(wi[i] * 0.1f);
    ho[i] = __float2bfloat16(wo[i]);
  }
  std::vector<int> ids(k);
  for (int i = 0; i < k; ++i) ids[i] = i * 12 + 1;
  Buffer<float> dx(x), dy(std::vector<float>(d, 0.0f));
  Buffer<bf16> di(hi), dd(ho);
  Buffer<int> did(ids);
  experts<<<k / 4, 128>>>(dx, di, dd, did, dy, d);
  const auto y = dy.host();
  std::vector<double> expected(d), size(d);
  for (const int e : ids) {
    double dot = 0;
    for (int i = 0; i < d; ++i) dot += double(x[i]) * __bfloat162float(hi[e * d + i]);
    const double h = 0.5 * dot * (1 + std::tanh(0.79788456 * (dot + 0.044715 * dot * dot * dot)));
    for (int i = 0; i < d; ++i) {
      const double v = h * __bfloat162float(ho[e * d + i]);
      expected[i] += v;
      size[i] += std::abs(v);
    }
  }
  for (int i = 0; i < d; ++i) EXPECT_NEAR(y[i], expected[i], 1e-5 * size[i] + 1e-6);
}

__global__ void swiglu(const __half2* gate, const __half2* up, __half2* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float2 g = __half22float2(gate[i]), u = __half22float2(up[i]);
  y[i] = __floats2half2_rn(g.x / (1 + __expf(-g.x)) * u.x, g.y / (1 + __expf(-g.y)) * u.y);
}

TEST_F(Kernels, SwigluInHalves) {
  const int n = 501;
  const auto g = normal(2 * n, 10), u = normal(2 * n, 11);
  std::vector<__half2> hg(n), hu(n);
  for (int i = 0; i < n; ++i) {
    hg[i] = __floats2half2_rn(g[2 * i], g[2 * i + 1]);
    hu[i] = __floats2half2_rn(u[2 * i], u[2 * i + 1]);
  }
  Buffer<__half2> dg(hg), du(hu), dy(n);
  swiglu<<<(n + 127) / 128, 128>>>(dg, du, dy, n);
  const auto y = dy.host();
  for (int i = 0; i < n; ++i) {
    const double a = __half2float(hg[i].x), b = __half2float(hu[i].x);
    const double expected = a / (1 + std::exp(-a)) * b;
    EXPECT_NEAR(__half2float(y[i].x), expected, std::abs(expected) * 0x1p-10 + 1e-6);
  }
}

// The last block to finish adds up what the others left: fences and an atomic order them.
__global__ void sum_all(const float* x, int n, float* partial, unsigned* done, float* total) {
  __shared__ float part[8];
  __shared__ bool last;
  float s = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) s += x[i];
  for (int o = 16; o > 0; o /= 2) s += __shfl_down_sync(~0u, s, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < blockDim.x / 32; ++i) s += part[i];
    partial[blockIdx.x] = s;
    __threadfence();
    last = atomicInc(done, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float t = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) t += partial[i];
    *total = t;
  }
}

TEST_F(Kernels, LastBlockReduces) {
  std::vector<float> x(10000);
  std::iota(x.begin(), x.end(), 0.0f);
  for (float& v : x) v = std::fmod(v, 16.0f);
  Buffer<float> dx(x), partial(7), total(1);
  Buffer<unsigned> done(std::vector<unsigned>{0});
  for (int round = 0; round < 3; ++round) {
    sum_all<<<7, 256>>>(dx, static_cast<int>(x.size()), partial, done, total);
    EXPECT_EQ(total.host()[0], 75000.0f);
  }
}

// All blocks meet twice in one launch.
__global__ void ring(int* a, int* b) {
  auto grid = cg::this_grid();
  const int i = grid.thread_rank(), n = grid.size();
  a[i] = i;
  grid.sync();
  b[i] = a[(i + 33) % n];
  grid.sync();
  a[i] = b[(i + 1) % n];
}

TEST_F(Kernels, CooperativeGridSync) {
  Buffer<int> a(4 * 64), b(4 * 64);
  int* pa = a;
  int* pb = b;
  void* args[] = {&pa, &pb};
  check(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(ring), dim3(4), dim3(64), args, 0,
                                    nullptr));
  check(cudaDeviceSynchronize());
  const auto h = a.host();
  for (int i = 0; i < 256; ++i) EXPECT_EQ(h[i], (i + 34) % 256);
}

__global__ void use_symbols(float* y) {
  const int i = threadIdx.x;
  y[i] = scale_of[i % 4] * i + bias_table[i % 4];
  atomicAdd(&call_count, 1);
}

TEST_F(Kernels, ConstantAndDeviceVariables) {
  const float scale[4] = {1, 2, 3, 4};
  check(cudaMemcpyToSymbol(scale_of, scale, sizeof scale));
  const int zero = 0;
  check(cudaMemcpyToSymbol(call_count, &zero, sizeof zero));
  Buffer<float> y(64);
  use_symbols<<<1, 64>>>(y);
  const auto h = y.host();
  const float bias[4] = {0.5f, -1.0f, 2.0f, 0.25f};
  for (int i = 0; i < 64; ++i) EXPECT_EQ(h[i], scale[i % 4] * i + bias[i % 4]);
  int count = 0;
  check(cudaMemcpyFromSymbol(&count, call_count, sizeof count));
  EXPECT_EQ(count, 64);
  void* at = nullptr;
  size_t bytes = 0;
  check(cudaGetSymbolAddress(&at, call_count));
  check(cudaGetSymbolSize(&bytes, scale_of));
  EXPECT_EQ(bytes, sizeof scale);
}

__noinline__ __device__ float power_sum(const float* x, int n, float p) {
  float s = 0;
  for (int i = 0; i < n; ++i) s += powf(fabsf(x[i]), p);
  return s;
}
__global__ void calls(const float* x, float* y, int n) {
  const int i = threadIdx.x;
  float v;
  switch (i % 6) {
    case 0:
      v = power_sum(x, n, 2);
      break;
    case 1:
      v = power_sum(x + 1, n - 1, 1);
      break;
    case 2:
      v = erff(x[i]);
      break;
    case 3:
      v = logf(fabsf(x[i]) + 1);
      break;
    case 4:
      v = x[i] / 3.0f + sqrtf(fabsf(x[i]));
      break;
    default:
      v = static_cast<float>(static_cast<double>(x[i]) / 7.0);
  }
  y[i] = v;
}

TEST_F(Kernels, CallsBranchesAndMathFunctions) {
  const auto x = normal(64, 12);
  Buffer<float> dx(x), dy(64);
  calls<<<1, 64>>>(dx, dy, 20);
  const auto y = dy.host();
  for (int i = 0; i < 64; ++i) {
    double e = 0;
    if (i % 6 == 0)
      for (int k = 0; k < 20; ++k) e += double(x[k]) * x[k];
    if (i % 6 == 1)
      for (int k = 1; k < 20; ++k) e += std::abs(x[k]);
    if (i % 6 == 2) e = std::erf(x[i]);
    if (i % 6 == 3) e = std::log(std::abs(x[i]) + 1.0);
    if (i % 6 == 4) e = x[i] / 3.0 + std::sqrt(std::abs(double(x[i])));
    if (i % 6 == 5) e = x[i] / 7.0;
    EXPECT_NEAR(y[i], e, 4e-6 * std::abs(e) + 1e-7) << i;
  }
}

__global__ void many_atomics(float* f, __nv_bfloat162* pair, __half2* half, unsigned long long* u,
                             int* minimum, unsigned* wrap, unsigned short* lock) {
  atomicAdd(f, 0.5f);
  atomicAdd(pair, __floats2bfloat162_rn(1, 2));
  atomicAdd(half, __floats2half2_rn(1, 0.5f));
  atomicAdd(u, 1ull << 33);
  atomicMin(minimum, -static_cast<int>(threadIdx.x));
  atomicInc(wrap, 9);
  atomicCAS(lock, static_cast<unsigned short>(threadIdx.x),
            static_cast<unsigned short>(threadIdx.x + 1));
}

TEST_F(Kernels, Atomics) {
  Buffer<float> f(std::vector<float>{0});
  Buffer<__nv_bfloat162> pair(std::vector<__nv_bfloat162>{__floats2bfloat162_rn(0, 0)});
  Buffer<__half2> half(std::vector<__half2>{__floats2half2_rn(0, 0)});
  Buffer<unsigned long long> u(std::vector<unsigned long long>{0});
  Buffer<int> minimum(std::vector<int>{0});
  Buffer<unsigned> wrap(std::vector<unsigned>{0});
  Buffer<unsigned short> lock(std::vector<unsigned short>{0, 7});
  many_atomics<<<2, 64>>>(f, pair, half, u, minimum, wrap, lock);
  EXPECT_EQ(f.host()[0], 64.0f);
  EXPECT_EQ(__bfloat162float(pair.host()[0].x), 128.0f);
  EXPECT_EQ(__bfloat162float(pair.host()[0].y), 256.0f);
  EXPECT_EQ(__half2float(half.host()[0].y), 64.0f);
  EXPECT_EQ(u.host()[0], 128ull << 33);
  EXPECT_EQ(minimum.host()[0], -63);
  EXPECT_EQ(wrap.host()[0], 128u % 10);
  EXPECT_EQ(lock.host()[1], 7);
}

struct Table {
  int n;
  float values[13];
  long long wide[2];
};
__global__ void from_struct(Table t, float* y) {
  y[threadIdx.x] = t.values[threadIdx.x % t.n] + static_cast<float>(t.wide[threadIdx.x % 2]);
}

TEST_F(Kernels, StructParameterIndexedByTheThread) {
  Table t = {13, {}, {100, 200}};
  for (int i = 0; i < 13; ++i) t.values[i] = i * 0.5f;
  Buffer<float> y(40);
  from_struct<<<1, 40>>>(t, y);
  const auto h = y.host();
  for (int i = 0; i < 40; ++i) EXPECT_EQ(h[i], i % 13 * 0.5f + (i % 2 ? 200 : 100));
}

__global__ void says(const char* what) {
  if (threadIdx.x == 3)
    printf("thread %d: %s %5.2f %llx%%\n", threadIdx.x, "text", 1.5, 0x123456789all);
}

TEST_F(Kernels, Printf) {
  testing::internal::CaptureStdout();
  says<<<1, 32>>>(nullptr);
  check(cudaDeviceSynchronize());
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "thread 3: text  1.50 123456789a%\n");
}

}  // namespace
}  // namespace cudasim::test
