#pragma once

#include <cstddef>

#include "kernels/cuda/base/blas.h"
#include "kernels/cuda/linear.h"

namespace moesaic::cuda {

/// Bytes of a good workspace for gemm(): n_tokens, rows of X of up to max_cols, matrices of up to
/// max_elements. It holds the rounded X, and at most 32 MiB of W.
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

}  // namespace moesaic::cuda
