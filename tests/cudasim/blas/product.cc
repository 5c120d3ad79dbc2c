#include <cblas.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "tests/cudasim/blas/handle.h"
#include "tests/cudasim/exec/number.h"
#include "tests/cudasim/runtime/hooks.h"

namespace cudasim::blas {
namespace {

bool known(cudaDataType_t t) { return t == CUDA_R_32F || t == CUDA_R_16F || t == CUDA_R_16BF; }
std::size_t size_of(cudaDataType_t t) { return t == CUDA_R_32F ? 4 : 2; }

float element(const void* data, cudaDataType_t type, i64 at) {
  if (type == CUDA_R_32F) return static_cast<const float*>(data)[at];
  const u16 bits = static_cast<const u16*>(data)[at];
  return type == CUDA_R_16F ? to_float(Half{bits}) : to_float(Bf16{bits});
}

void store(void* data, cudaDataType_t type, i64 at, float v) {
  if (type == CUDA_R_32F) {
    static_cast<float*>(data)[at] = v;
  } else {
    static_cast<u16*>(data)[at] = type == CUDA_R_16F ? to_half(v).bits : to_bf16(v).bits;
  }
}

float rounded_to_tf32(float v) {
  const u32 b = std::bit_cast<u32>(v);
  return v - v == 0 ? std::bit_cast<float>((b + 0x1000) & 0xffffe000u) : v;
}

// Checked column by column: what lies between the columns is not the product's.
void check_columns(const void* data, cudaDataType_t type, i64 rows, i64 columns, i64 leading,
                   bool read, const char* what) {
  for (i64 c = 0; c < columns; ++c) {
    const auto* at =
        static_cast<const std::byte*>(data) + static_cast<std::size_t>(c * leading) * size_of(type);
    cudasim_check(at, static_cast<std::size_t>(rows) * size_of(type), read ? 1 : 0, what);
  }
}

std::vector<float> packed(const void* data, cudaDataType_t type, i64 rows, i64 columns, i64 leading,
                          bool tf32) {
  std::vector<float> v(static_cast<std::size_t>(rows * columns));
  for (i64 c = 0; c < columns; ++c) {
    for (i64 r = 0; r < rows; ++r) {
      const float x = element(data, type, c * leading + r);
      v[static_cast<std::size_t>(c * rows + r)] = tf32 ? rounded_to_tf32(x) : x;
    }
  }
  return v;
}

float finished(const Product& p, float v) {
  switch (p.epilogue) {
    case Epilogue::Relu:
      return v > 0 ? v : 0;
    case Epilogue::Gelu:
      return 0.5f * v * (1 + std::tanh(0.7978845608f * (v + 0.044715f * v * v * v)));
    case Epilogue::None:
      break;
  }
  return v;
}

void multiply(const Product& p, const void* a, const void* b, const void* c, void* d) {
  const i64 a_rows = p.transpose_a ? p.k : p.m, a_columns = p.transpose_a ? p.m : p.k;
  const i64 b_rows = p.transpose_b ? p.n : p.k, b_columns = p.transpose_b ? p.k : p.n;
  float alpha = p.alpha, beta = p.beta;
  if (p.alpha_at != nullptr) {
    cudasim_check(p.alpha_at, 4, 1, "alpha");
    cudasim_check(p.beta_at, 4, 1, "beta");
    alpha = *p.alpha_at;
    beta = *p.beta_at;
  }
  check_columns(a, p.a.type, a_rows, a_columns, p.a.leading, true, "A");
  check_columns(b, p.b.type, b_rows, b_columns, p.b.leading, true, "B");
  if (beta != 0) check_columns(c, p.c.type, p.m, p.n, p.c.leading, true, "C");
  if (p.bias != nullptr) {
    cudasim_check(p.bias, static_cast<std::size_t>(p.m) * size_of(p.bias_type), 1, "bias");
  }
  check_columns(d, p.d.type, p.m, p.n, p.d.leading, false, "D");
  const auto fa = packed(a, p.a.type, a_rows, a_columns, p.a.leading, p.tf32);
  const auto fb = packed(b, p.b.type, b_rows, b_columns, p.b.leading, p.tf32);
  std::vector<float> sum(static_cast<std::size_t>(p.m * p.n));
  if (p.m * p.n > 0 && p.k > 0) {
    cblas_sgemm(CblasColMajor, p.transpose_a ? CblasTrans : CblasNoTrans,
                p.transpose_b ? CblasTrans : CblasNoTrans, static_cast<int>(p.m),
                static_cast<int>(p.n), static_cast<int>(p.k), alpha, fa.data(),
                static_cast<int>(a_rows), fb.data(), static_cast<int>(b_rows), 0.0f, sum.data(),
                static_cast<int>(p.m));
  }
  for (i64 j = 0; j < p.n; ++j) {
    for (i64 i = 0; i < p.m; ++i) {
      float v = sum[static_cast<std::size_t>(j * p.m + i)];
      if (beta != 0) v += beta * element(c, p.c.type, j * p.c.leading + i);
      if (p.bias != nullptr) v += element(p.bias, p.bias_type, i);
      store(d, p.d.type, j * p.d.leading + i, finished(p, v));
    }
  }
}

const void* matrix(const Matrix& m, i64 index, bool pointer_arrays) {
  if (pointer_arrays) {
    const auto* pointers = static_cast<const void* const*>(m.data) + index;
    cudasim_check(pointers, sizeof(void*), 1, "array of pointers");
    return *pointers;
  }
  return static_cast<const std::byte*>(m.data) +
         static_cast<std::size_t>(index * m.stride) * size_of(m.type);
}

void run(void* data) {
  const Product& p = *static_cast<const Product*>(data);
  for (i64 n = 0; n < p.batch; ++n) {
    multiply(p, matrix(p.a, n, p.pointer_arrays), matrix(p.b, n, p.pointer_arrays),
             matrix(p.c, n, p.pointer_arrays), const_cast<void*>(matrix(p.d, n, p.pointer_arrays)));
  }
}

}  // namespace

cublasStatus_t enqueue(cudaStream_t stream, const Product& p) {
  for (const Matrix* m : {&p.a, &p.b, &p.c, &p.d}) {
    if (known(m->type)) continue;
    std::fprintf(stderr, "cudasim: cuBLAS: data type %d is not modelled\n",
                 static_cast<int>(m->type));
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  const i64 a_rows = p.transpose_a ? p.k : p.m, b_rows = p.transpose_b ? p.n : p.k;
  if (p.m < 0 || p.n < 0 || p.k < 0 || p.batch < 0 || p.a.leading < std::max<i64>(1, a_rows) ||
      p.b.leading < std::max<i64>(1, b_rows) || p.c.leading < std::max<i64>(1, p.m) ||
      p.d.leading < std::max<i64>(1, p.m)) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (p.a.type != p.b.type) return CUBLAS_STATUS_NOT_SUPPORTED;
  const int e = cudasim_enqueue(
      stream, "cuBLAS product", run, nullptr, [](void* d) { delete static_cast<Product*>(d); },
      new Product(p));
  return e == 0 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

}  // namespace cudasim::blas
