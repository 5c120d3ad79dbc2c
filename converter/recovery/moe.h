#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "converter/recovery/arithmetic.h"
#include "kernels/secret_moe.h"

namespace moesaic::converter {

/// Sizes of a secret-MoE layer with gated experts behind a low-rank router.
struct MoeShape {
  kernels::Activation phi = kernels::Activation::Silu;
  std::int64_t d_model = 0;
  std::int64_t n_shared = 0;
  std::int64_t n_experts = 0;
  std::int64_t n_active = 0;
  std::int64_t router_rank = 0;
  std::int64_t bypass_rank = 0;

  std::int64_t n_neurons() const { return n_shared + n_experts; }
};

/// All that training changes in such a layer; also its gradient, and what Adam keeps of it. The
/// shared neurons stand first.
template <class T>
struct MoeParameters {
  AlignedBuffer<T> w_gate, w_up, w_down;  // [n_shared + n_experts, d_model] each
  AlignedBuffer<T> bypass_q;              // [bypass_rank, d_model]
  AlignedBuffer<T> bypass_p;              // [d_model, bypass_rank]
  AlignedBuffer<T> bias;                  // [d_model]
  AlignedBuffer<T> router_v;              // [router_rank, d_model]
  AlignedBuffer<T> router_u;              // [n_experts, router_rank]
  AlignedBuffer<T> router_bias;           // [n_experts]

  MoeParameters() = default;
  /// Zero throughout.
  explicit MoeParameters(const MoeShape& shape);

  /// The tensors in the order above; those of the router are the last three.
  std::vector<std::span<T>> tensors();
  static constexpr std::size_t kTensors = 9;
  static constexpr std::size_t kFirstOfRouter = 6;
  static constexpr std::array<const char*, kTensors> kNames = {
      "gate", "up", "down", "bypass_q", "bypass_p", "bias", "router_v", "router_u", "router_bias"};
};

/// How the router learns beside the rest of the layer.
struct RouterTraining {
  /// Weight of the regression loss Σ_t ω_t ‖R(x_t) − c_t‖² / (Σ_t ω_t · scale), c_t,i =
  /// |f_i(x_t) − μ_i| ‖w_down,i‖ of the current neurons, no gradient into c.
  double auxiliary = 1;
  double scale = 1;  // mean of ω‖R − c‖² at the start, so that the loss begins at 1
  /// Weight of the straight-through gate: with e_i = <∂L/∂y, (f_i − μ_i) w_down,i>, what the loss
  /// would gain per unit of expert i's gate, each score near the threshold θ (midway between the
  /// k-th largest score and the next) receives κ_i (e_i − ē), κ_i = max(0, 1 − |s_i − θ| / width)
  /// / width and ē the κ-weighted mean: the number of experts stays k. 0: off.
  double straight_through = 0;
  double width = 0.1;  // of κ, in standard deviations of a token's scores
};

/// What the way back needs from the way forward.
template <class P>
struct MoeTape {
  Storage<typename P::Operand> x;                     // [n, d_model]
  Storage<typename P::Operand> f;                     // [n, n_neurons] mask ⊙ (f − μ)
  Storage<typename P::Operand> slope_gate, slope_up;  // [n, n_neurons] ∂f/∂(gate·x), ∂f/∂(up·x)
  Storage<typename P::Operand> gap;                   // [n, n_experts] R(x) − c
  Storage<typename P::Operand> z;                     // [n, router_rank] V x
  Storage<typename P::Operand> qx;                    // [n, bypass_rank] Q x
  Storage<typename P::Operand> centred, kappa;        // [n, n_experts], straight-through alone
  Storage<typename P::Operand> contribution;          // [rows asked for, n_experts] c
  std::vector<double> squared_gap;                    // [n] ‖R(x) − c‖²
};

/// One layer: parameters (borrowed) and their operands.
template <class P>
class MoeLayer {
 public:
  using Scalar = typename P::Scalar;
  using Operand = typename P::Operand;

  MoeLayer(const MoeShape& shape, MoeParameters<Scalar>& parameters, std::vector<Scalar> mean);

  /// Takes the parameters over after they changed.
  void refresh(Context& ctx);

  /// y = the layer's output (kernels/secret_moe.h).   x, y [n, d_model]. The contributions c of the
  /// first `contribution_rows` rows are kept in the tape.
  void forward(Context& ctx, const RouterTraining& router, MatrixView<const Scalar> x,
               std::int64_t contribution_rows, MoeTape<P>& tape, MatrixView<Scalar> y) const;

  /// Gradients of L + auxiliary · (the router's regression loss), given dy = ∂L/∂y and ω [n] (their
  /// sum `total_weight`, over the whole step if it comes in several parts): added to `gradient`; dx
  /// = ∂L/∂x, if asked for (dx.data not null), is overwritten. No gradient passes through the
  /// selection nor, to x, through the router. Returns the part's regression loss.
  double backward(Context& ctx, const RouterTraining& router, MatrixView<const Scalar> dy,
                  std::span<const Scalar> weight, double total_weight, MoeTape<P>& tape,
                  MoeParameters<Scalar>& gradient, MatrixView<Scalar> dx) const;

  const MoeShape& shape() const { return shape_; }
  MoeParameters<Scalar>& parameters() const { return parameters_; }
  std::span<const Scalar> mean() const { return mean_; }

 private:
  void activate_row(const RouterTraining& router, std::int64_t t, bool keep_contribution,
                    Scalar* gate, Scalar* up, Scalar* scores, std::span<Scalar> scratch,
                    std::span<std::int32_t> ids, MoeTape<P>& tape) const;

  MoeShape shape_;
  MoeParameters<Scalar>& parameters_;
  std::vector<Scalar> mean_;       // μ [n_neurons], 0 for shared ones
  std::vector<Scalar> down_norm_;  // ‖w_down,i‖ [n_neurons]
  Storage<Operand> w_gate_, w_up_, w_down_, bypass_q_, bypass_p_, router_u_;
};

}  // namespace moesaic::converter
