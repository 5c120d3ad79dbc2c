#pragma once

#include <cstdint>
#include <span>

#include "kernels/activation.h"
#include "kernels/base/context.h"
#include "kernels/base/view.h"

namespace moesaic::kernels {

/// What the paths of a layer with packed weights cost on a machine, in ns; a column is one of
/// d_model, "active" a shared or selected neuron. The defaults are those of two threads of a Zen 4
/// with Q4_1 experts; `moesaic bench --costs` measures a machine's own.
struct PathConstants {
  double gather = 0.13;         // per token, active neuron and column
  double grouped = 0.085;       // likewise
  double grouped_read = 0.055;  // per neuron that any token of the batch needs, and column
  double masked = 0.0225;       // per token, neuron and column, unselected neurons counted
  double masked_least = 0.14;   // per neuron and column: what a batch takes at least
};

/// One secret-MoE layer with single-neuron GLU experts behind a low-rank router, no gate (DESIGN.md
/// section 1):
///
///   f_i(x) = φ(w_gate,i · x)(w_up,i · x)                          one neuron's activation
///   R(x)   = U (V x) + c                                          scores of the n_experts routed
///   neurons y      = b + Σ_{i∈shared} f_i(x) w_down,i + Σ_{i∈TopK(R(x))} (f_i(x) − μ_i) w_down,i +
///   P (Q x)
///
/// μ_i is the neuron's mean over calibration: what an unselected neuron is taken to contribute; Σ
/// μ_i w_down,i is part of b. Rows 3i, 3i+1, 3i+2 of `experts` are w_gate,i, w_up,i, w_down,i, so
/// that one selected expert is one contiguous read. Source: arXiv 2512.18452 (router, shared part);
/// our own start from the teacher's neurons.
struct SecretMoeView {
  Activation phi = Activation::Silu;
  std::int64_t n_active = 0;           // k, routed neurons that run per token; 0 <= k <= n_experts
  WeightView shared;                   // [3 n_shared, d_model]
  WeightView experts;                  // [3 n_experts, d_model]
  std::span<const float> expert_mean;  // μ [n_experts]
  WeightView router_v;                 // V [router_rank, d_model]
  WeightView router_u;                 // U [n_experts, router_rank]
  std::span<const float> router_bias;  // c [n_experts]
  WeightView bypass_q;                 // Q [bypass_rank, d_model], may be empty
  WeightView bypass_p;                 // P [d_model, bypass_rank], may be empty
  std::span<const float> bias;         // b [d_model]

  // The same weights in the orders that Activations::Q16 reads, besides the panels of the router
  // and the bypass; all of them or none.
  const std::byte* shared_neurons = nullptr;  // kernels/neurons.h
  const std::byte* expert_neurons = nullptr;  // likewise
  // All neurons, the shared ones first, as a dense MLP, in panels alone, for batches. The down
  // matrix is rounded to bfloat16: its file format has scales along the wrong side.
  WeightView all_gate = {};  // [n_shared + n_experts, d_model]
  WeightView all_up = {};    // the same
  WeightView all_down = {};  // [d_model, n_shared + n_experts], BF16

  PathConstants costs = {};  // for MoePath::Auto with packed weights

  std::int64_t d_model() const { return static_cast<std::int64_t>(bias.size()); }
  std::int64_t n_shared() const { return shared.rows / 3; }
  std::int64_t n_experts() const { return experts.rows / 3; }
  std::int64_t router_rank() const { return router_v.rows; }
  std::int64_t bypass_rank() const { return bypass_q.rows; }
};

/// How a batch is computed. All paths make the same selection, and up to float32 summation order
/// give the same result. With packed weights (Activations::Q16) results agree to the precision of
/// their products: masked rounds the down rows and their activations to bfloat16 (2⁻⁹ each); the
/// others multiply the file's codes by 16-bit coefficients, of which 16 neurons share a scale.
enum class MoePath {
  Auto,  // the cheapest by packed_path_costs(); without packed weights by batch size alone
  Gather,  // token by token: router → top-k → gather → expert → scatter-add, fused, nothing kept
           // but the k ids
  Grouped,  // tokens sorted by expert: each expert that any token selected is read once
  Masked,   // all experts by dense products, unselected activations set to zero: bytes and work of
            // the dense MLP
};

/// True if secret_moe() reads the packed weights of the layer: they are there and the context says
/// Q16.
bool uses_packed(const Context& ctx, const SecretMoeView& layer);

/// Estimated ns of a layer with packed weights on each path, routing included, by
/// SecretMoeView::costs.
struct PathCosts {
  double gather = 0;
  double grouped = 0;
  double masked = 0;
};
PathCosts packed_path_costs(const SecretMoeView& layer, std::int64_t n_tokens);

/// Neurons of the layer that n_tokens touch at least once, if each chose its experts at random:
/// n_shared + n_experts (1 − (1 − n_active / n_experts)^n_tokens).
double distinct_neurons(const SecretMoeView& layer, std::int64_t n_tokens);

/// The path that Auto takes for a batch of n_tokens.
MoePath choose_moe_path(const Context& ctx, const SecretMoeView& layer, std::int64_t n_tokens);

/// y_t = secret_moe(x_t).   x, y [n_tokens, d_model] (distinct memory). `selected`, if not empty,
/// receives the chosen expert ids [n_tokens, n_active], ascending per token. Touches router,
/// bypass, shared and (Gather, Grouped) only the selected experts, and tallies exactly those bytes.
/// Deterministic for a given thread count. Throws ShapeError.
void secret_moe(Context& ctx, const SecretMoeView& layer, ConstMatrix x, Matrix y,
                MoePath path = MoePath::Auto, std::span<std::int32_t> selected = {});

/// Throws ShapeError naming the part unless all shapes of the layer fit each other.
void check_shapes(const SecretMoeView& layer);

}  // namespace moesaic::kernels
