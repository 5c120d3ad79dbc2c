#pragma once

#include <cstdint>

#include "converter/recovery/arithmetic.h"

namespace moesaic::converter {

struct AttentionShape {
  int n_heads = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  double scale = 0;
  std::int64_t window = 0;  // sliding window in positions; 0: global
  std::int64_t n_ctx = 0;   // rows are whole windows of text of this length
};

/// Causal grouped-query attention within windows of text (the formula of kernels/attention.h, every
/// n_ctx rows a sequence from position 0 on). T float or double.
///   q, out [n, n_heads · head_dim], k, v [n, n_kv_heads · head_dim]
///   lse [n, n_heads]: ln Σ_p exp(scale · q·k_p), kept for the way back
template <class T>
void attention_forward(Context& ctx, const AttentionShape& shape, MatrixView<const T> q,
                       MatrixView<const T> k, MatrixView<const T> v, MatrixView<T> out,
                       MatrixView<T> lse);

/// Gradients of attention_forward, given d_out = ∂L/∂out: with P the softmax,
///   dV = Pᵀ dO,  dS = P ⊙ (dO Vᵀ − rowsum(dO ⊙ O)),  dQ = scale dS K,  dK = scale dSᵀ Q.
/// The softmax is computed again, block by block, from lse. d_q, d_k, d_v are overwritten.
/// Source: Dao et al. 2022 (arXiv 2205.14135), appendix B.
template <class T>
void attention_backward(Context& ctx, const AttentionShape& shape, MatrixView<const T> q,
                        MatrixView<const T> k, MatrixView<const T> v, MatrixView<const T> out,
                        MatrixView<const T> lse, MatrixView<const T> d_out, MatrixView<T> d_q,
                        MatrixView<T> d_k, MatrixView<T> d_v);

}  // namespace moesaic::converter
