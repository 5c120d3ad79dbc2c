// The halves of a layer on a GPU, forward and backward.

#include "converter/recovery/cuda/hybrid.h"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/rope.h"
#include "kernels/cuda/training/elementwise.h"

namespace moesaic::converter {
namespace {

using cuda::Bf16Matrix;

Bf16Matrix bits(std::span<const std::uint16_t> part, std::int64_t rows, std::int64_t cols) {
  return {part.data(), rows, cols};
}

}  // namespace

cuda::WindowShape CudaHybrid::window_shape(const Layer& layer) const {
  return {.n_heads = config_.n_heads,
          .n_kv_heads = config_.n_kv_heads,
          .head_dim = config_.head_dim,
          .scale = config_.attention_scale,
          .window = layer.attention.window,
          .n_ctx = s_.n_ctx};
}

Bf16Matrix CudaHybrid::operand(ConstMatrix x) {
  cuda::to_bf16(x.data, x.rows * x.cols, s_.operand.data(), stream_);
  return {s_.operand.data(), x.rows, x.cols};
}

Bf16Matrix CudaHybrid::matrix_of(const Layer& layer, std::size_t m) const {
  const std::span<const std::uint16_t> w =
      layer.converted ? converted_[*layer.converted].tensors[m].operand : layer.dense[m];
  const bool down = m == 2;
  return {w.data(), down ? config_.d_model : config_.d_ff, down ? config_.d_ff : config_.d_model};
}

// r += post_norm?(W_o attention(rope(norm?(W_q x)), rope(norm?(W_k x)), W_v x)), x = norm(r).
void CudaHybrid::attention_forward(const Layer& layer, CudaTape& tape, std::int64_t m) {
  const Attention& a = layer.attention;
  const std::int64_t d = config_.d_model, d_head = config_.head_dim;
  const float eps = config_.norm_eps;
  const Matrix r = view(s_.r, m, d), x = view(s_.x, m, d);
  const Matrix q = view(tape.q, m, q_cols()), k = view(tape.k, m, kv_cols());
  const Matrix v = view(tape.v, m, kv_cols());
  const bool normed = !a.q_norm.empty();
  const Matrix q_raw = normed ? view(tape.q_raw, m, q_cols()) : q;
  const Matrix k_raw = normed ? view(tape.k_raw, m, kv_cols()) : k;
  cuda::rms_norm(r, a.norm.data(), eps, x, stream_);
  const Bf16Matrix in = operand(x);
  blas_.multiply(false, true, in, bits(a.w[kQuery], q_cols(), d), false, q_raw);
  blas_.multiply(false, true, in, bits(a.w[kKey], kv_cols(), d), false, k_raw);
  blas_.multiply(false, true, in, bits(a.w[kValue], kv_cols(), d), false, v);
  if (normed) {
    cuda::rms_norm(heads(q_raw, d_head), a.q_norm.data(), eps, heads(q, d_head), stream_);
    cuda::rms_norm(heads(k_raw, d_head), a.k_norm.data(), eps, heads(k, d_head), stream_);
  }
  for (const Matrix& part : {q, k}) {
    cuda::rope(part, config_.head_dim, s_.positions.data(), a.freq.data(), config_.rope_style,
               stream_);
  }
  const Matrix mixed = view(tape.mixed, m, q_cols());
  cuda::window_attention(blas_, window_shape(layer), q, k, v, mixed,
                         view(tape.lse, m, config_.n_heads), s_.attention, stream_);
  const Bf16Matrix w_o = bits(a.w[kAttentionOutput], d, q_cols());
  if (a.post_norm.empty()) {
    blas_.multiply(false, true, operand(mixed), w_o, true, r);
    return;
  }
  const Matrix out = view(tape.out, m, d);
  blas_.multiply(false, true, operand(mixed), w_o, false, out);
  cuda::rms_norm(out, a.post_norm.data(), eps, x, stream_);
  cuda::add(x, r, stream_);
}

CudaConverted* CudaHybrid::moe_of(const Layer& layer) {
  if (!layer.converted) return nullptr;
  CudaConverted& own = converted_[*layer.converted];
  return own.host->moe() != nullptr ? &own : nullptr;
}

// r += post_norm?(MLP of norm(r)).
void CudaHybrid::mlp_forward(const Layer& layer, CudaTape& tape, std::int64_t m, bool counts) {
  const std::int64_t d = config_.d_model;
  const Matrix r = view(s_.r, m, d), x = view(s_.x, m, d);
  cuda::copy(r.data, m * d, tape.r_mid.data(), stream_);
  cuda::rms_norm(r, layer.mlp_norm.data(), config_.norm_eps, x, stream_);
  const bool normed = !layer.post_mlp_norm.empty();
  const Matrix y = normed ? view(tape.mlp_out, m, d) : r;
  if (const CudaConverted* moe = moe_of(layer)) {
    moe_forward(*moe, tape, y, !normed);
  } else {
    gated_forward(layer, tape, y, !normed, counts);
  }
  if (!normed) return;
  cuda::rms_norm(y, layer.post_mlp_norm.data(), config_.norm_eps, x, stream_);
  cuda::add(x, r, stream_);
}

// y = or += W_down h, h of x in the scratch.
void CudaHybrid::gated_forward(const Layer& layer, CudaTape& tape, Matrix y, bool accumulate,
                               bool counts) {
  const std::int64_t m = y.rows, d = config_.d_model, n = config_.d_ff;
  const Matrix x = view(s_.x, m, d), gate = view(s_.gate, m, n), up = view(s_.up, m, n);
  const Bf16Matrix all = bits(tape.x, m, d);
  Bf16Matrix gate_input = all, up_input = all;
  cuda::Threshold gate_threshold, hidden_threshold;
  cuda::Count* neurons = nullptr;
  if (layer.converted) {
    const CudaConverted& own = converted_[*layer.converted];
    cuda::Count* to = counts ? own.counts.data() : s_.ignored.data();
    cuda::keep_large(x, own.threshold_of(kInput), tape.x.data(), tape.large.data(),
                     tape.mask.data(), to, stream_);
    gate_input = bits(tape.large, m, d);
    if (own.host->self_routed()->layer.shape().up_by_input) up_input = gate_input;
    gate_threshold = own.threshold_of(kGate);
    hidden_threshold = own.threshold_of(kHidden);
    neurons = to + 1;
  } else {
    cuda::to_bf16(x.data, m * d, tape.x.data(), stream_);
  }
  blas_.multiply(false, true, gate_input, matrix_of(layer, 0), false, gate);
  blas_.multiply(false, true, up_input, matrix_of(layer, 1), false, up);
  cuda::keep_neurons(layer.phi, gate, up, gate_threshold, hidden_threshold, tape.h.data(),
                     tape.slope_gate.data(), tape.slope_up.data(), neurons, stream_);
  blas_.multiply(false, true, bits(tape.h, m, n), matrix_of(layer, 2), accumulate, y);
}

// Adds to the layer's gradients; dr, the gradient behind the block, becomes the one before it,
// where wanted.
void CudaHybrid::mlp_backward(const Layer& layer, CudaTape& tape, std::int64_t m,
                              std::int64_t n_step, bool need_dr) {
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
  if (CudaConverted* moe = moe_of(layer)) {
    moe_backward(*moe, tape, dy, n_step, dx);
  } else {
    gated_backward(layer, tape, dy, dx);
  }
  if (!need_dr) return;
  cuda::rms_norm_backward(view(tape.r_mid, m, d), layer.mlp_norm.data(), eps, dx, true, dr,
                          stream_);
}

// dx = ∂L/∂x unless it holds no data.
void CudaHybrid::gated_backward(const Layer& layer, CudaTape& tape, ConstMatrix dy, Matrix dx) {
  const std::int64_t m = dy.rows, d = config_.d_model, n = config_.d_ff;
  const Matrix dh = view(s_.gate, m, n);
  const Bf16Matrix dyo = operand(dy);
  blas_.multiply(false, false, dyo, matrix_of(layer, 2), false, dh);
  cuda::scale_slopes(dh.data, m * n, tape.slope_gate.data(), tape.slope_up.data(), stream_);
  const Bf16Matrix dg = bits(tape.slope_gate, m, n), du = bits(tape.slope_up, m, n);
  bool by_input = true;  // whether both products read what the mask left
  const TrainedSelfRouted<Bfloat16>* host = nullptr;
  if (layer.converted) {
    CudaConverted& own = converted_[*layer.converted];
    host = own.host->self_routed();
    by_input = host->layer.shape().up_by_input;
    const Bf16Matrix large = bits(tape.large, m, d);
    blas_.multiply(true, false, dyo, bits(tape.h, m, n), true, view(own.tensors[2].gradient, d, n));
    blas_.multiply(true, false, dg, large, true, view(own.tensors[0].gradient, n, d));
    blas_.multiply(true, false, du, by_input ? large : bits(tape.x, m, d), true,
                   view(own.tensors[1].gradient, n, d));
  }
  if (dx.data == nullptr) return;
  blas_.multiply(false, false, dg, matrix_of(layer, 0), false, dx);
  if (by_input) blas_.multiply(false, false, du, matrix_of(layer, 1), true, dx);
  if (host != nullptr && !host->straight_through) {
    cuda::mask_gradient(tape.mask.data(), m * d, dx.data, stream_);
  }
  if (!by_input) blas_.multiply(false, false, du, matrix_of(layer, 1), true, dx);
}

// dr becomes the gradient before the block, r_in being the stream there.
void CudaHybrid::attention_backward(const Layer& layer, CudaTape& tape, ConstMatrix r_in,
                                    std::int64_t m) {
  const Attention& a = layer.attention;
  const std::int64_t d = config_.d_model, d_head = config_.head_dim;
  const float eps = config_.norm_eps;
  const Matrix dr = view(s_.dr, m, d), dn = view(s_.x, m, d);
  ConstMatrix d_out = dr;
  if (!a.post_norm.empty()) {
    cuda::rms_norm_backward(view(tape.out, m, d), a.post_norm.data(), eps, dr, false, dn, stream_);
    d_out = dn;
  }
  const Matrix d_mixed = view(s_.d_mixed, m, q_cols());
  blas_.multiply(false, false, operand(d_out), bits(a.w[kAttentionOutput], d, q_cols()), false,
                 d_mixed);
  const Matrix dq = view(s_.dq, m, q_cols()), dk = view(s_.dk, m, kv_cols());
  const Matrix dv = view(s_.dv, m, kv_cols());
  cuda::window_attention_backward(blas_, window_shape(layer), view(tape.q, m, q_cols()),
                                  view(tape.k, m, kv_cols()), view(tape.v, m, kv_cols()),
                                  view(tape.mixed, m, q_cols()), view(tape.lse, m, config_.n_heads),
                                  d_mixed, dq, dk, dv, s_.attention, stream_);
  for (const Matrix& part : {dq, dk}) {
    cuda::rope(part, config_.head_dim, s_.positions.data(), a.back_freq.data(), config_.rope_style,
               stream_);
  }
  if (!a.q_norm.empty()) {
    cuda::rms_norm_backward(heads(view(tape.q_raw, m, q_cols()), d_head), a.q_norm.data(), eps,
                            heads(dq, d_head), false, heads(dq, d_head), stream_);
    cuda::rms_norm_backward(heads(view(tape.k_raw, m, kv_cols()), d_head), a.k_norm.data(), eps,
                            heads(dk, d_head), false, heads(dk, d_head), stream_);
  }
  const std::array<Matrix, 3> parts = {dq, dk, dv};
  for (std::size_t p = 0; p < parts.size(); ++p) {
    blas_.multiply(false, false, operand(parts[p]), bits(a.w[p], parts[p].cols, d), p > 0, dn);
  }
  cuda::rms_norm_backward(r_in, a.norm.data(), eps, dn, true, dr, stream_);
}

}  // namespace moesaic::converter
