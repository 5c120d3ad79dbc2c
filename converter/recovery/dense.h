#pragma once

#include "converter/recovery/arithmetic.h"

namespace moesaic::converter {

/// A gated MLP that stays as it is, y = W_down (φ(W_gate x) ⊙ W_up x), and the way of a gradient
/// through it.
template <class P>
struct DenseTape {
  Storage<typename P::Operand> slope_gate, slope_up;  // [n, d_ff] ∂h/∂(gate·x), ∂h/∂(up·x)
};

template <class P>
class DenseLayer {
 public:
  using Scalar = typename P::Scalar;
  using Operand = typename P::Operand;

  kernels::Activation phi = kernels::Activation::Silu;
  Storage<Operand> w_gate, w_up;  // [d_ff, d_model]
  Storage<Operand> w_down;        // [d_model, d_ff]

  /// x, y [n, d_model]
  void forward(Context& ctx, MatrixView<const Scalar> x, DenseTape<P>& tape,
               MatrixView<Scalar> y) const {
    const Workspace::Scope scope(ctx.workspace);
    const std::int64_t n = w_gate.view().rows;
    const MatrixView<Operand> operand = take_matrix<Operand>(ctx, x.rows, x.cols);
    to_operand(ctx, x, operand);
    const MatrixView<Scalar> gate = take_matrix<Scalar>(ctx, x.rows, n);
    const MatrixView<Scalar> up = take_matrix<Scalar>(ctx, x.rows, n);
    const MatrixView<Operand> h = take_matrix<Operand>(ctx, x.rows, n);
    product(ctx, false, true, operand, w_gate.view(), false, gate);
    product(ctx, false, true, operand, w_up.view(), false, up);
    const MatrixView<Operand> slope_gate = tape.slope_gate.reshape(x.rows, n);
    const MatrixView<Operand> slope_up = tape.slope_up.reshape(x.rows, n);
    const MatrixView<Scalar> slope = take_matrix<Scalar>(ctx, ctx.pool.n_threads(), n);
    for_each_row(ctx, x.rows, [&](std::int64_t t, int thread) {
      activation_slope(phi, gate.row(t), n, gate.row(t), slope.row(thread));
      for (std::int64_t i = 0; i < n; ++i) slope.row(thread)[i] *= up.row(t)[i];
      to_operand(slope.row(thread), n, slope_gate.row(t));
      to_operand(gate.row(t), n, slope_up.row(t));
      for (std::int64_t i = 0; i < n; ++i) up.row(t)[i] *= gate.row(t)[i];
      to_operand(up.row(t), n, h.row(t));
    });
    product(ctx, false, true, h, w_down.view(), false, y);
  }

  /// dx = ∂L/∂x, given dy = ∂L/∂y.   [n, d_model] both
  void backward(Context& ctx, MatrixView<const Scalar> dy, DenseTape<P>& tape,
                MatrixView<Scalar> dx) const {
    const Workspace::Scope scope(ctx.workspace);
    const std::int64_t n = w_gate.view().rows;
    const MatrixView<Operand> operand = take_matrix<Operand>(ctx, dy.rows, dy.cols);
    to_operand(ctx, dy, operand);
    const MatrixView<Scalar> dh = take_matrix<Scalar>(ctx, dy.rows, n);
    product(ctx, false, false, operand, w_down.view(), false, dh);
    const MatrixView<Scalar> row = take_matrix<Scalar>(ctx, ctx.pool.n_threads(), n);
    bool accumulate = false;
    for (const auto& [slope, w] : {std::pair{&tape.slope_gate, &w_gate}, {&tape.slope_up, &w_up}}) {
      const MatrixView<Operand> s = slope->view();
      for_each_row(ctx, dy.rows, [&](std::int64_t t, int thread) {
        from_operand(s.row(t), n, row.row(thread));
        for (std::int64_t i = 0; i < n; ++i) row.row(thread)[i] *= dh.row(t)[i];
        to_operand(row.row(thread), n, s.row(t));
      });
      product(ctx, false, false, s, w->view(), accumulate, dx);
      accumulate = true;
    }
  }

 private:
  static void product(Context& ctx, bool trans_a, bool trans_b, MatrixView<const Operand> a,
                      MatrixView<const Operand> b, bool accumulate, MatrixView<Scalar> c) {
    multiply(ctx, trans_a, trans_b, a, b, accumulate, c);
  }
};

}  // namespace moesaic::converter
