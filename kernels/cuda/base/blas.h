#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/base/view.h"
#include "kernels/cuda/base/device_buffer.h"
#include "kernels/cuda/base/stream.h"

struct cublasContext;

namespace moesaic::cuda {

/// Row-major matrix of bfloat16 in device memory, as bits; `stride` elements from row to row.
using Bf16Matrix = MatrixView<const std::uint16_t>;

/// cuBLAS on one stream. The library is loaded when the first of these is made: a program that
/// never makes one starts and runs without it.
class Blas {
 public:
  /// Throws DeviceError, naming the library, if it is not there or does not start.
  explicit Blas(const Stream& stream);
  ~Blas();
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;

  /// Queues Y = X Wᵀ, or Y += X Wᵀ.   x [n, cols], w [rows, cols], y [n, rows]. Products of
  /// bfloat16 are exact in float32, in which they are summed (CUBLAS_COMPUTE_32F); the order is
  /// cuBLAS's. Allocates nothing: its workspace is its own. Throws DeviceError, ShapeError.
  void multiply(Bf16Matrix x, Bf16Matrix w, Matrix y, bool accumulate);

  /// The same of C = op(A) op(B), op a transposition where asked for.   op(A) [m, k], op(B) [k, n],
  /// C [m, n]
  void multiply(bool trans_a, bool trans_b, Bf16Matrix a, Bf16Matrix b, bool accumulate, Matrix c);

  /// The same of float32.
  void multiply(bool trans_a, bool trans_b, ConstMatrix a, ConstMatrix b, bool accumulate,
                Matrix c);

  /// Matrices of one shape, `step` elements from one to the next.
  template <class T>
  struct Batch {
    MatrixView<T> first;
    std::int64_t step = 0;
  };
  /// Queues n products of float32, C = alpha op(A) op(B) or C += alpha op(A) op(B).
  void multiply_batch(std::int64_t n, bool trans_a, bool trans_b, float alpha, Batch<const float> a,
                      Batch<const float> b, bool accumulate, Batch<float> c);

 private:
  cublasContext* handle_ = nullptr;
  DeviceBuffer<std::byte> workspace_;
};

}  // namespace moesaic::cuda
