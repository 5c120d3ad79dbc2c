#include "models/mlp.h"

#include "kernels/linear.h"

namespace moesaic::models {
namespace {

void dense_forward(Context& ctx, const DenseMlp& mlp, ConstMatrix x, Matrix y) {
  const Workspace::Scope scope(ctx.workspace);
  const std::int64_t d_ff = mlp.w_gate.rows;
  const auto n = static_cast<std::size_t>(x.rows * d_ff);
  const Matrix gate(ctx.workspace.take<float>(n).data(), x.rows, d_ff);
  const Matrix up(ctx.workspace.take<float>(n).data(), x.rows, d_ff);
  kernels::linear(ctx, mlp.w_gate, x, gate, Traffic::Mlp);
  kernels::linear(ctx, mlp.w_up, x, up, Traffic::Mlp);
  kernels::gated_activation(ctx, mlp.phi, gate, up, gate);
  kernels::linear(ctx, mlp.w_down, gate, y, Traffic::Mlp);
}

std::int64_t weights(const DenseMlp& mlp) {
  return mlp.w_gate.rows * mlp.w_gate.cols + mlp.w_up.rows * mlp.w_up.cols +
         mlp.w_down.rows * mlp.w_down.cols;
}

std::int64_t weights(const kernels::SecretMoeView& moe) {
  const std::int64_t d_model = moe.d_model();
  return moe.router_rank() * (d_model + moe.n_experts()) + 2 * moe.bypass_rank() * d_model +
         3 * d_model * (moe.n_shared() + moe.n_active);
}

}  // namespace

void mlp_forward(Context& ctx, const Mlp& mlp, ConstMatrix x, Matrix y,
                 std::span<std::int32_t> selected) {
  if (const auto* dense = std::get_if<DenseMlp>(&mlp)) {
    dense_forward(ctx, *dense, x, y);
  } else {
    kernels::secret_moe(ctx, std::get<kernels::SecretMoeView>(mlp), x, y, kernels::MoePath::Auto,
                        selected);
  }
}

std::int64_t multiply_adds(const Mlp& mlp) {
  return std::visit([](const auto& form) { return weights(form); }, mlp);
}

}  // namespace moesaic::models
