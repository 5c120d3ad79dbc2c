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

 private:
  cublasContext* handle_ = nullptr;
  DeviceBuffer<std::byte> workspace_;
};

}  // namespace moesaic::cuda
