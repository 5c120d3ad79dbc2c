#pragma once

#include <cstdint>
#include <span>

#include "kernels/activation.h"
#include "kernels/base/context.h"
#include "kernels/base/view.h"

namespace moesaic::kernels {

/// What one neuron computes.
enum class ExpertKind {
  Glu,     // f(x) = φ(w_gate · x)(w_up · x): rows w_gate, w_up, w_down
  Gelu,    // f(x) = φ(w_in · x + b), φ GELU in its tanh form: rows w_in, w_out
  Linear,  // f(x) = w_in · x: rows w_in, w_out
};

/// Who chooses the experts.
enum class RouterKind {
  LowRank,     // R = U (V x) + c      V [r, d_model], U [n_experts, r], c [n_experts]
  FullRank,    // R = U x + c          U [n_experts, d_model]
  ProductKey,  // expert a · m + b, m = √n_experts, scores s_a + s'_b:  s = U (V x) + c from the
               // first half of each, s' from the second   V [2 r, d_model], U [2 m, r], c [2 m]
};

/// What a selected expert's output is multiplied by.
enum class GateKind {
  None,     // 1
  Softmax,  // softmax over the k selected scores
  Score,    // its score
};

struct MixtureKind {
  ExpertKind expert = ExpertKind::Glu;
  RouterKind router = RouterKind::LowRank;
  GateKind gate = GateKind::None;
  bool operator==(const MixtureKind&) const = default;
};

/// Weight rows of a neuron: 3 for GLU, else 2.
std::int64_t rows_per_neuron(ExpertKind kind);

/// The layer of DESIGN.md section 1 in its general form:
///
///   y = b + Σ_{i∈shared} f_i(x) w_out,i + Σ_{e∈TopK(R(x))} g_e(x) Σ_{i∈e} (f_i(x) − μ_i) w_out,i
///         + P (Q x)
///
/// SecretMoeView is the case "glu + low_rank + none" with single neurons, and has the fused
/// kernels. An expert is a block of `block` neurons in contiguous rows: all of its first rows
/// (w_gate or w_in), then, with GLU, all w_up, then all w_down or w_out. Shared neurons are blocks
/// of one. Sources: arXiv 2512.18452 (gelu + low_rank + softmax), 2407.04153 (gelu + product_key +
/// softmax, PEER), 2606.07414 (linear + product_key + score).
struct MixtureView {
  MixtureKind kind;
  Activation phi = Activation::GeluTanh;  // of GLU; Gelu is what it says
  std::int64_t block = 1;                 // neurons of an expert
  std::int64_t n_active = 0;              // k, experts that run per token; 0 <= k <= n_experts
  WeightView shared;                      // [c n_shared, d_model], c = rows_per_neuron
  WeightView experts;                     // [c block n_experts, d_model]
  std::span<const float> shared_bias;     // b [n_shared] of Gelu, else empty
  std::span<const float> expert_bias;     // b [block n_experts] of Gelu, else empty
  std::span<const float> expert_mean;     // μ [block n_experts], or empty: 0
  WeightView router_v;                    // see RouterKind; no rows at full rank
  WeightView router_u;
  std::span<const float> router_bias;  // c
  WeightView bypass_q;                 // Q [bypass_rank, d_model], may be empty
  WeightView bypass_p;                 // P [d_model, bypass_rank], may be empty
  std::span<const float> bias;         // b [d_model]

  std::int64_t d_model() const { return static_cast<std::int64_t>(bias.size()); }
  std::int64_t n_shared() const { return shared.rows / rows_per_neuron(kind.expert); }
  std::int64_t n_experts() const { return experts.rows / (rows_per_neuron(kind.expert) * block); }
  /// Length of what U is multiplied with; d_model at full rank.
  std::int64_t router_rank() const { return router_u.cols; }
  std::int64_t bypass_rank() const { return bypass_q.rows; }
};

/// Multiply-adds of one token: router, bypass, shared and selected neurons, and one for each
/// selected neuron's gate where there is one.
std::int64_t multiply_adds(const MixtureView& layer);

/// y_t = mixture(x_t).   x, y [n_tokens, d_model] (distinct memory). `selected`, if not empty,
/// receives the chosen expert ids [n_tokens, n_active], ascending per token; ties: the lower id
/// wins. `gates`, if not empty, receives what each of them was multiplied by. Of the experts only
/// the selected ones are read, token by token; a tally counts them and the shared neurons once per
/// token, router and bypass once per 512 tokens. With Activations::BF16 what enters a product is
/// rounded to bfloat16. Deterministic for a given thread count. Throws ShapeError.
void mixture(Context& ctx, const MixtureView& layer, ConstMatrix x, Matrix y,
             std::span<std::int32_t> selected = {}, std::span<float> gates = {});

/// Throws ShapeError naming the part unless all shapes of the layer fit each other.
void check_shapes(const MixtureView& layer);

}  // namespace moesaic::kernels
