#pragma once

#include <cublas_v2.h>

#include "tests/cudasim/base.h"

struct cublasContext {
  cudaStream_t stream = nullptr;
  cublasMath_t math = CUBLAS_DEFAULT_MATH;
  cublasPointerMode_t pointers = CUBLAS_POINTER_MODE_HOST;
};

namespace cudasim::blas {

/// A matrix as cuBLAS has it: column-major, `leading` elements from one column to the next.
struct Matrix {
  const void* data = nullptr;
  cudaDataType_t type = CUDA_R_32F;
  i64 leading = 0;
  i64 stride = 0;  // elements from one matrix of a batch to the next
};

enum class Epilogue { None, Relu, Gelu };

/// D = epilogue(alpha op(A) op(B) + beta C + bias), op(A) [m, k], op(B) [k, n], C and D [m, n],
/// bias [m]; for each of `batch` matrices. Products and sums in float32 (with tf32, A and B are
/// rounded to it first), rounded once to D's type, as cuBLAS documents for CUBLAS_COMPUTE_32F.
struct Product {
  bool transpose_a = false, transpose_b = false;
  i64 m = 0, n = 0, k = 0;
  Matrix a, b, c, d;
  i64 batch = 1;
  bool pointer_arrays = false;  // data of a, b, c, d are device arrays of `batch` pointers
  float alpha = 1, beta = 0;
  const float* alpha_at = nullptr;  // device pointer mode: read when the product runs
  const float* beta_at = nullptr;
  bool tf32 = false;
  Epilogue epilogue = Epilogue::None;
  const void* bias = nullptr;
  cudaDataType_t bias_type = CUDA_R_32F;
};

/// Checks what can be checked at the call, and enqueues the product.
cublasStatus_t enqueue(cudaStream_t stream, const Product& p);

}  // namespace cudasim::blas
