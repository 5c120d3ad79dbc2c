// The halves of a layer on a GPU, backward.

#include "converter/recovery/cuda/hybrid.h"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/rope.h"
#include "kernels/cuda/training/elementwise.h"

namespace moesaic::converter {
namespace {

using cuda::Bf16Matrix;

template <class T>
Bf16Matrix bits(std::span<T> part, std::int64_t rows, std::int64_t cols) {
  return {part.data(), rows, cols};
}

}  // namespace

// Adds to the layer's gradients; dr, the gradient behind the block, becomes the one before it,
// where wanted.
void CudaHybrid::mlp_backward(std::size_t index, CudaTape& tape, std::int64_t m,
                              std::int64_t n_step, bool need_dr) {
  const CudaDecoder::Layer& layer = frozen_.layer(index);
  const std::int64_t d = config_.d_model;
  const float eps = config_.norm_eps;
  const Matrix dr = view(s_.dr, m, d), dx = need_dr ? view(s_.x, m, d) : Matrix();
  ConstMatrix dy = dr;
  if (!layer.post_mlp_norm.empty()) {
    const Matrix y = view(s_.y, m, d);
    cuda::rms_norm_backward(view(tape.mlp_out, m, d), layer.post_mlp_norm.data(), eps, dr, false, y,
                            stream_);
    dy = y;
  }
  if (CudaConverted* moe = moe_of(index)) {
    moe_backward(*moe, tape, dy, n_step, dx);
  } else {
    gated_backward(index, tape, dy, dx);
  }
  if (!need_dr) return;
  cuda::rms_norm_backward(view(tape.r_mid, m, d), layer.mlp_norm.data(), eps, dx, true, dr,
                          stream_);
}

// dx = ∂L/∂x unless it holds no data.
void CudaHybrid::gated_backward(std::size_t index, CudaTape& tape, ConstMatrix dy, Matrix dx) {
  const CudaMlp mlp = mlp_of(index, false);
  CudaConverted* own = converted_at_[index] ? &converted_[*converted_at_[index]] : nullptr;
  const std::int64_t m = dy.rows, d = config_.d_model, n = config_.d_ff;
  const Matrix dh = view(s_.gate, m, n);
  const Bf16Matrix w_gate = bits(mlp.w[0], n, d), w_up = bits(mlp.w[1], n, d);
  const Bf16Matrix dyo = frozen_.operand(dy);
  blas_.multiply(false, false, dyo, bits(mlp.w[2], d, n), false, dh);
  cuda::scale_slopes(dh.data, m * n, tape.slope_gate.data(), tape.slope_up.data(), stream_);
  const Bf16Matrix dg = bits(tape.slope_gate, m, n), du = bits(tape.slope_up, m, n);
  // Whether both products read what the mask left.
  const bool by_input = own == nullptr || mlp.up_by_input;
  if (own != nullptr) {
    const Bf16Matrix large = bits(tape.large, m, d);
    blas_.multiply(true, false, dyo, bits(tape.h, m, n), true,
                   view(own->tensors[2].gradient, d, n));
    blas_.multiply(true, false, dg, large, true, view(own->tensors[0].gradient, n, d));
    blas_.multiply(true, false, du, by_input ? large : bits(tape.x, m, d), true,
                   view(own->tensors[1].gradient, n, d));
  }
  if (dx.data == nullptr) return;
  blas_.multiply(false, false, dg, w_gate, false, dx);
  if (by_input) blas_.multiply(false, false, du, w_up, true, dx);
  if (own != nullptr && !own->host->self_routed()->straight_through) {
    cuda::mask_gradient(tape.mask.data(), m * d, dx.data, stream_);
  }
  if (!by_input) blas_.multiply(false, false, du, w_up, true, dx);
}

// dr becomes the gradient before the block, r_in being the stream there.
void CudaHybrid::attention_backward(std::size_t index, CudaTape& tape, ConstMatrix r_in,
                                    std::int64_t m) {
  const CudaDecoder::Layer& layer = frozen_.layer(index);
  const CudaDecoder::Attention& a = layer.attention;
  const std::int64_t q_cols = frozen_.q_cols(), kv_cols = frozen_.kv_cols();
  const std::int64_t d = config_.d_model, d_head = config_.head_dim;
  const float eps = config_.norm_eps;
  const Matrix dr = view(s_.dr, m, d), dn = view(s_.x, m, d);
  ConstMatrix d_out = dr;
  if (!a.post_norm.empty()) {
    cuda::rms_norm_backward(view(tape.out, m, d), a.post_norm.data(), eps, dr, false, dn, stream_);
    d_out = dn;
  }
  const Matrix d_mixed = view(s_.d_mixed, m, q_cols);
  blas_.multiply(false, false, frozen_.operand(d_out), bits(a.w[kAttentionOutput], d, q_cols),
                 false, d_mixed);
  const Matrix dq = view(s_.dq, m, q_cols), dk = view(s_.dk, m, kv_cols);
  const Matrix dv = view(s_.dv, m, kv_cols);
  cuda::window_attention_backward(blas_, frozen_.window_shape(layer), view(tape.q, m, q_cols),
                                  view(tape.k, m, kv_cols), view(tape.v, m, kv_cols),
                                  view(tape.mixed, m, q_cols), view(tape.lse, m, config_.n_heads),
                                  d_mixed, dq, dk, dv, s_.attention, stream_);
  for (const Matrix& part : {dq, dk}) {
    cuda::rope(part, config_.head_dim, s_.positions.data(), a.back_freq.data(), config_.rope_style,
               stream_);
  }
  if (!a.q_norm.empty()) {
    cuda::rms_norm_backward(heads(view(tape.q_raw, m, q_cols), d_head), a.q_norm.data(), eps,
                            heads(dq, d_head), false, heads(dq, d_head), stream_);
    cuda::rms_norm_backward(heads(view(tape.k_raw, m, kv_cols), d_head), a.k_norm.data(), eps,
                            heads(dk, d_head), false, heads(dk, d_head), stream_);
  }
  const std::array<Matrix, 3> parts = {dq, dk, dv};
  for (std::size_t p = 0; p < parts.size(); ++p) {
    blas_.multiply(false, false, frozen_.operand(parts[p]), bits(a.w[p], parts[p].cols, d), p > 0,
                   dn);
  }
  cuda::rms_norm_backward(r_in, a.norm.data(), eps, dn, true, dr, stream_);
}

}  // namespace moesaic::converter
