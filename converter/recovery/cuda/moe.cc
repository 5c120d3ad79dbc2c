// A secret-MoE layer on a GPU, forward and backward (converter/recovery/moe.h).

#include "converter/recovery/cuda/hybrid.h"
#include "kernels/cuda/training/elementwise.h"
#include "kernels/cuda/training/experts.h"

namespace moesaic::converter {
namespace {

bool has_gate(const TrainedMoe<Bfloat16>& host) {
  const MoeShape& s = host.layer.shape();
  return host.router.straight_through > 0 && s.n_active > 0 && s.n_active < s.n_experts;
}

}  // namespace

// y = or += the layer's output of x in the scratch.
void CudaHybrid::moe_forward(const CudaConverted& own, CudaTape& tape, Matrix y, bool accumulate) {
  const TrainedMoe<Bfloat16>& host = *own.host->moe();
  const MoeShape& s = host.layer.shape();
  const std::int64_t m = y.rows, d = s.d_model, n = s.n_neurons(), r = s.router_rank;
  const Matrix x = view(s_.x, m, d), gate = view(s_.gate, m, n), up = view(s_.up, m, n);
  const Matrix z = view(s_.ranks, m, r), scores = view(s_.scores, m, s.n_experts);
  const auto operand_of = [&](MoeTensor t, std::int64_t rows, std::int64_t cols) {
    return view(own.tensors[t].operand, rows, cols);
  };
  const auto xo = view(tape.x, m, d);
  cuda::to_bf16(x.data, m * d, xo.data, stream_);
  blas_.multiply(false, true, xo, operand_of(kMoeGate, n, d), false, gate);
  blas_.multiply(false, true, xo, operand_of(kMoeUp, n, d), false, up);
  // The runtime routes in full precision.
  blas_.multiply(false, true, x, view(own.tensors[kRouterV].value, r, d), false, z);
  blas_.multiply(false, true, z, view(own.tensors[kRouterU].value, s.n_experts, r), false, scores);
  cuda::to_bf16(z.data, m * r, tape.z.data(), stream_);
  cuda::choose_experts(own.tensors[kRouterBias].value.data(), s.n_active, scores, s_.ids.data(),
                       tape.mask.data(), stream_);
  const bool gated = has_gate(host);
  cuda::expert_slopes(
      {.phi = s.phi, .n_shared = s.n_shared, .mean = own.mean.data(), .norm = own.norm.data()},
      gate, up, scores, tape.mask.data(),
      cuda::ExpertTape<std::uint16_t>{.f = tape.h.data(),
                                      .slope_gate = tape.slope_gate.data(),
                                      .slope_up = tape.slope_up.data(),
                                      .gap = tape.gap.data(),
                                      .centred = gated ? tape.centred.data() : nullptr,
                                      .squared_gap = tape.squared_gap.data()},
      stream_);
  if (gated) {
    cuda::gate_slopes(scores, tape.mask.data(), static_cast<float>(host.router.width),
                      tape.kappa.data(), stream_);
  }
  blas_.multiply(false, false, view(tape.h, m, n), operand_of(kMoeDown, n, d), accumulate, y);
  if (const std::int64_t q = s.bypass_rank; q > 0) {
    const Matrix qx = view(s_.ranks, m, q);
    blas_.multiply(false, true, xo, operand_of(kMoeQ, q, d), false, qx);
    cuda::to_bf16(qx.data, m * q, tape.qx.data(), stream_);
    blas_.multiply(false, true, view(tape.qx, m, q), operand_of(kMoeP, d, q), true, y);
  }
  cuda::add_bias(own.tensors[kMoeBias].value.data(), y, stream_);
}

// Adds to the layer's gradients and its router's loss; dx = ∂L/∂x unless it holds no data.
void CudaHybrid::moe_backward(CudaConverted& own, CudaTape& tape, ConstMatrix dy,
                              std::int64_t n_step, Matrix dx) {
  const TrainedMoe<Bfloat16>& host = *own.host->moe();
  const MoeShape& s = host.layer.shape();
  const std::int64_t m = dy.rows, d = s.d_model, n = s.n_neurons(), r = s.router_rank;
  const auto operand_of = [&](MoeTensor t, std::int64_t rows, std::int64_t cols) {
    return view(own.tensors[t].operand, rows, cols);
  };
  const auto gradient = [&](MoeTensor t, std::int64_t rows, std::int64_t cols) {
    return view(own.tensors[t].gradient, rows, cols);
  };
  const auto xo = view(tape.x, m, d);
  const cuda::Bf16Matrix dyo = frozen_.operand(dy);
  cuda::add_rows(dy, own.tensors[kMoeBias].gradient.data(), stream_);
  blas_.multiply(true, false, view(tape.h, m, n), dyo, true, gradient(kMoeDown, n, d));
  const Matrix df = view(s_.gate, m, n);
  blas_.multiply(false, true, dyo, operand_of(kMoeDown, n, d), false, df);

  // gap becomes the scores' gradient, the slopes those of the gate and up products.
  cuda::token_weights(view(tape.r_mid, m, d),
                      config_.post_norms ? view(tape.mlp_out, m, d) : Matrix(), s_.weight.data(),
                      stream_);
  const double unit = 1 / (static_cast<double>(n_step) * host.router.scale);
  cuda::add_weighted(tape.squared_gap.data(), s_.weight.data(), m, unit, own.auxiliary.data(),
                     stream_);
  cuda::StraightThrough straight;
  if (has_gate(host)) {
    straight = {static_cast<float>(host.router.straight_through), df.data + s.n_shared, n,
                tape.centred.data(), tape.kappa.data()};
  }
  const auto ds = view(tape.gap, m, s.n_experts);
  cuda::score_gradients(s_.weight.data(), 2 * host.router.auxiliary * unit, straight, ds, stream_);
  cuda::scale_slopes(df.data, m * n, tape.slope_gate.data(), tape.slope_up.data(), stream_);
  const auto dg = view(tape.slope_gate, m, n), du = view(tape.slope_up, m, n);
  blas_.multiply(true, false, dg, xo, true, gradient(kMoeGate, n, d));
  blas_.multiply(true, false, du, xo, true, gradient(kMoeUp, n, d));
  if (dx.data != nullptr) {
    blas_.multiply(false, false, dg, operand_of(kMoeGate, n, d), false, dx);
    blas_.multiply(false, false, du, operand_of(kMoeUp, n, d), true, dx);
  }
  if (const std::int64_t q = s.bypass_rank; q > 0) {
    blas_.multiply(true, false, dyo, view(tape.qx, m, q), true, gradient(kMoeP, d, q));
    const Matrix dq = view(s_.ranks, m, q);
    blas_.multiply(false, false, dyo, operand_of(kMoeP, d, q), false, dq);
    const auto dqo = view(s_.rank_operand, m, q);
    cuda::to_bf16(dq.data, m * q, dqo.data, stream_);
    blas_.multiply(true, false, dqo, xo, true, gradient(kMoeQ, q, d));
    if (dx.data != nullptr) {
      blas_.multiply(false, false, dqo, operand_of(kMoeQ, q, d), true, dx);
    }
  }

  blas_.multiply(true, false, ds, view(tape.z, m, r), true, gradient(kRouterU, s.n_experts, r));
  const Matrix dz = view(s_.ranks, m, r);
  blas_.multiply(false, false, ds, operand_of(kRouterU, s.n_experts, r), false, dz);
  const auto dzo = view(s_.rank_operand, m, r);
  cuda::to_bf16(dz.data, m * r, dzo.data, stream_);
  blas_.multiply(true, false, dzo, xo, true, gradient(kRouterV, r, d));
  cuda::add_rows(ds, own.tensors[kRouterBias].gradient.data(), stream_);
}

}  // namespace moesaic::converter
