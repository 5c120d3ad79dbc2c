#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/activation.h"
#include "kernels/base/context.h"
#include "kernels/base/view.h"
#include "kernels/linear.h"

namespace moesaic::kernels {

/// A gated MLP whose neurons are the experts and whose gate projection, taken over the large
/// entries of x, is their router:
///
///   x̂ = x where |x_j| >= θx_j, else 0          g = W_gate x̂,  a = φ(g)
///   routed: i with |a_i| >= θg_i                 u_i = w_up,i · x, for the routed ones
///   kept: routed i with |a_i u_i| >= θh_i        y = Σ_kept a_i u_i w_down,i
///
/// With `up_by_input` u = W_up x̂ for all neurons and nothing is routed by the gate: magnitude
/// thresholds at the input of each matrix alone (TEAL, arXiv 2408.14690). Each matrix is so read by
/// columns (those of the large inputs) or by rows (those of the routed neurons); how many varies
/// with the token. The router never lags behind the experts: it is a part of them. Sources: CATS
/// (arXiv 2404.08763) for routing by the gate; the cascade of the two is ours. NaN in x or weights:
/// an activation that is NaN is not kept.
struct SelfRoutedView {
  Activation phi = Activation::Silu;
  bool up_by_input = false;
  WeightView w_gate;                        // [d_ff, d_model]
  WeightView w_up;                          // [d_ff, d_model]
  WeightView w_down;                        // [d_model, d_ff]
  std::span<const float> input_threshold;   // θx [d_model]
  std::span<const float> gate_threshold;    // θg [d_ff]; empty with up_by_input
  std::span<const float> hidden_threshold;  // θh [d_ff]

  // The same weights in the orders in which single columns and rows are read: by Activations::Q16,
  // besides their panels, all of them or none; on a GPU in place of the file's rows, as
  // kernels/cuda/self_routed.h says.
  const std::byte* gate_columns = nullptr;  // kernels/columns.h
  const std::byte* up_parts = nullptr;      // columns with up_by_input, else pack_in_rows()
  const std::byte* down_columns = nullptr;

  // Shares of columns, routed and kept neurons per token, means over the calibration text.
  float input_share = 1, gate_share = 1, hidden_share = 1;

  std::int64_t d_model() const { return w_gate.cols; }
  std::int64_t d_ff() const { return w_gate.rows; }
};

/// Multiply-adds of one token, given how many columns, routed and kept neurons it has.
std::int64_t multiply_adds(const SelfRoutedView& layer, std::int64_t n_inputs,
                           std::int64_t n_routed, std::int64_t n_kept);

/// How tokens are computed. Both ways keep the same entries and neurons but for values that lie
/// within rounding of their threshold.
enum class SelfRoutedPath {
  Auto,    // the cheaper one by choose_self_routed_path()
  Dense,   // dense products of all matrices, with zeros for what is below its threshold
  Sparse,  // token by token, reading no other columns and rows than the large ones, with Q16 and
           // the packed weights; Dense where they are missing
};

/// The path that Auto takes for a batch of n_tokens: Sparse as long as it costs less, by the shares
/// of the calibration text and what a byte costs on either path.
SelfRoutedPath choose_self_routed_path(const Context& ctx, const SelfRoutedView& layer,
                                       std::int64_t n_tokens);

/// y_t = the layer of f(x_t), f being the input's norm where it has one.   x, y [n_tokens,
/// d_model], distinct memory. Returns the multiply-adds that the tokens' thresholds left, whichever
/// way they were computed. Deterministic for a given thread count. Tallies what it read of the
/// weights under Mlp, scales included. Throws ShapeError.
std::int64_t self_routed(Context& ctx, const SelfRoutedView& layer, const LinearInput& input,
                         Matrix y, const Upcoming& next = {},
                         SelfRoutedPath path = SelfRoutedPath::Auto);

/// Throws ShapeError naming the part unless all shapes of the layer fit each other.
void check_shapes(const SelfRoutedView& layer);

}  // namespace moesaic::kernels
