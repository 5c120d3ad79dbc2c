#pragma once

#include <cstddef>

#include "kernels/cuda/base/blas.h"
#include "kernels/cuda/linear.h"

namespace moesaic::cuda {

/// Elements from one row of bfloat16 to the next: 16 bytes apart or a multiple, which cuBLAS's fast
/// kernels want.
constexpr std::int64_t bf16_stride(std::int64_t cols) { return (cols + 7) / 8 * 8; }

/// Bytes of a good workspace for gemm(): n_tokens, rows of X of up to max_cols, matrices of up to
/// max_elements (rows · bf16_stride(cols) where they stand in column panels). It holds the rounded
/// X, and at most 32 MiB of W.
std::size_t gemm_workspace(std::int64_t n_tokens, std::int64_t max_cols, std::int64_t max_elements);

/// The products of linear() for batches of many tokens, on tensor cores: X and W rounded to
/// bfloat16 (nearest even), products summed in float32 by cuBLAS. W is unpacked into the workspace,
/// as many rows at a time as it has room for (a bfloat16 W is read where it is); an X that
/// neighbouring products share is rounded once. Up to kMaxProducts, all with the same number of
/// tokens and without bias. No Y may overlap an X. Throws ShapeError, also for a workspace that has
/// no room for X and a row of W; DeviceError.
void gemm(Blas& blas, std::span<const Product> products, std::span<std::byte> workspace,
          StreamHandle stream);

inline void gemm(Blas& blas, const Product& product, std::span<std::byte> workspace,
                 StreamHandle stream) {
  gemm(blas, {&product, 1}, workspace, stream);
}

/// Y = X Wᵀ, or Y += X Wᵀ, of an X that is rounded already.   x [n_tokens, w.cols], w [rows, cols]
/// of any DType in the file's rows, or of one that has column panels (base/column_panels.h) and
/// standing in them alone, y [n_tokens, rows]; all in device memory.
struct Bf16Product {
  WeightView w;
  const std::byte* columns = nullptr;  // w's panels, at a multiple of 32 bytes; null: its rows
  Bf16Matrix x;
  Matrix y;
  bool accumulate = false;
};

/// The same of one such product, with a workspace for W alone, gemm_workspace(0, …). Panels are
/// unpacked whole: it must have room for 64 rows, or all. Throws ShapeError; DeviceError.
void gemm(Blas& blas, const Bf16Product& product, std::span<std::byte> workspace,
          StreamHandle stream);

}  // namespace moesaic::cuda
