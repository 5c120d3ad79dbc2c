#include "models/mlp.h"

#include <cmath>

namespace moesaic::models {
namespace {

void dense_forward(Context& ctx, const DenseMlp& mlp, const kernels::LinearInput& input, Matrix y,
                   const kernels::Upcoming& next) {
  const Workspace::Scope scope(ctx.workspace);
  const std::int64_t d_ff = mlp.w_gate.rows;
  const auto n = static_cast<std::size_t>(input.x.rows * d_ff);
  const Matrix h(ctx.workspace.take<float>(n).data(), input.x.rows, d_ff);
  kernels::read_ahead(ctx, {.weights = {mlp.w_down}});
  kernels::gated_linear(ctx, input, mlp.phi, mlp.w_gate, mlp.w_up, h, Traffic::Mlp);
  kernels::read_ahead(ctx, next);
  kernels::linear(ctx, mlp.w_down, h, y, Traffic::Mlp);
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

std::int64_t weights(const kernels::MixtureView& layer) { return kernels::multiply_adds(layer); }

std::int64_t weights(const kernels::SelfRoutedView& layer) {
  const double shares =
      static_cast<double>(layer.input_share) +
      static_cast<double>(layer.up_by_input ? layer.input_share : layer.gate_share) +
      static_cast<double>(layer.hidden_share);
  return std::llround(shares * static_cast<double>(layer.d_model() * layer.d_ff()));
}

}  // namespace

std::int64_t mlp_forward(Context& ctx, const Mlp& mlp, const kernels::LinearInput& input, Matrix y,
                         std::span<std::int32_t> selected, const kernels::Upcoming& next) {
  if (const auto* routed = std::get_if<kernels::SelfRoutedView>(&mlp)) {
    return kernels::self_routed(ctx, *routed, input, y, next);
  }
  if (const auto* dense = std::get_if<DenseMlp>(&mlp)) {
    dense_forward(ctx, *dense, input, y, next);
    return y.rows * multiply_adds(mlp);
  }
  kernels::read_ahead(ctx, next);
  const Workspace::Scope scope(ctx.workspace);
  const ConstMatrix x = kernels::normed(ctx, input);
  if (const auto* mixture = std::get_if<kernels::MixtureView>(&mlp)) {
    kernels::mixture(ctx, *mixture, x, y, selected);
  } else {
    kernels::secret_moe(ctx, std::get<kernels::SecretMoeView>(mlp), x, y, kernels::MoePath::Auto,
                        selected);
  }
  return y.rows * multiply_adds(mlp);
}

kernels::Upcoming first_weights(const Mlp& mlp) {
  if (const auto* dense = std::get_if<DenseMlp>(&mlp)) {
    return {.weights = {dense->w_gate, dense->w_up}, .gated = true};
  }
  if (const auto* routed = std::get_if<kernels::SelfRoutedView>(&mlp)) {
    // Which columns of the gate a single token reads is not known before.
    if (routed->gate_columns != nullptr) return {};
    return {.weights = {routed->w_gate}};
  }
  // A mixture's products have no panels to read ahead.
  const auto* moe = std::get_if<kernels::SecretMoeView>(&mlp);
  return moe != nullptr ? kernels::Upcoming{.weights = {moe->router_v}} : kernels::Upcoming{};
}

std::int64_t n_selected(const Mlp& mlp) {
  if (const auto* moe = std::get_if<kernels::SecretMoeView>(&mlp)) return moe->n_active;
  const auto* mixture = std::get_if<kernels::MixtureView>(&mlp);
  return mixture != nullptr ? mixture->n_active : 0;
}

std::int64_t multiply_adds(const Mlp& mlp) {
  return std::visit([](const auto& form) { return weights(form); }, mlp);
}

}  // namespace moesaic::models
