#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/base/view.h"
#include "kernels/cuda/base/blas.h"
#include "kernels/cuda/base/stream.h"

namespace moesaic::cuda {

/// Attention within windows of text: every n_ctx rows are a sequence from position 0 on.
struct WindowShape {
  int n_heads = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  float scale = 0;
  std::int64_t window = 0;  // sliding window in positions; 0: global
  std::int64_t n_ctx = 0;
};

/// Floats that either way needs as workspace: two squares of scores a head.
std::size_t window_attention_workspace(const WindowShape& shape);

/// Causal grouped-query attention (the formula of kernels/attention.h), float32 throughout, one
/// window after the other: scores and their products by cuBLAS, whole squares of them.
///   q, out [n, n_heads · head_dim], k, v [n, n_kv_heads · head_dim], n a multiple of n_ctx
///   lse [n, n_heads]: ln Σ_p exp(scale · q·k_p), kept for the way back
/// Rows lie without gaps. Throws ShapeError, DeviceError.
void window_attention(Blas& blas, const WindowShape& shape, ConstMatrix q, ConstMatrix k,
                      ConstMatrix v, Matrix out, Matrix lse, std::span<float> workspace,
                      StreamHandle stream);

/// Gradients of window_attention(), given d_out = ∂L/∂out: with P the softmax,
///   dV = Pᵀ dO,  dS = P ⊙ (dO Vᵀ − rowsum(dO ⊙ O)),  dQ = scale dS K,  dK = scale dSᵀ Q.
/// The softmax is computed again from lse. d_q, d_k, d_v are overwritten. Source: Dao et al. 2022
/// (arXiv 2205.14135), appendix B.
void window_attention_backward(Blas& blas, const WindowShape& shape, ConstMatrix q, ConstMatrix k,
                               ConstMatrix v, ConstMatrix out, ConstMatrix lse, ConstMatrix d_out,
                               Matrix d_q, Matrix d_k, Matrix d_v, std::span<float> workspace,
                               StreamHandle stream);

}  // namespace moesaic::cuda
