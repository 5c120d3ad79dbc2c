#pragma once

#include <cstdint>
#include <span>
#include <variant>
#include <vector>

#include "converter/linalg.h"
#include "kernels/base/aligned_buffer.h"
#include "kernels/base/context.h"
#include "models/mixture_file.h"
#include "models/mlp.h"
#include "models/secret_moe_file.h"

namespace moesaic::converter {

/// The sizes that the budget decides for one layer.
struct LayerPlan {
  bool dense = false;
  std::int64_t n_shared = 0;
  std::int64_t n_active = 0;     // k
  std::int64_t router_rank = 0;  // r
  std::int64_t bypass_rank = 0;  // q
  std::int64_t block = 1;        // neurons of an expert
  std::int64_t n_clones = 0;     // experts beyond those that the dense MLP's neurons make
};

/// Experts of a planned layer: (d_ff − n_shared) / block + n_clones.
std::int64_t n_experts(const LayerPlan& plan, std::int64_t d_ff);

/// Multiply-adds of a planned layer over the dense MLP's (DESIGN.md section 1, router and bypass
/// counted): [3 d (n_shared + k block) + r (d + n_experts) + 2 q d] / (3 d d_ff); 1 where the layer
/// stays dense.
double active_fraction(const LayerPlan& plan, std::int64_t d_model, std::int64_t d_ff);

/// A dense gated MLP in plain float32, one row per neuron.
struct Neurons {
  kernels::Activation phi = kernels::Activation::Silu;
  std::int64_t d_model = 0;
  std::int64_t n = 0;                         // neurons
  AlignedBuffer<float> w_gate, w_up, w_down;  // [n, d_model] each

  ConstMatrix gate() const { return {w_gate.data(), n, d_model}; }
  ConstMatrix up() const { return {w_up.data(), n, d_model}; }
  ConstMatrix down() const { return {w_down.data(), n, d_model}; }
};

/// Unpacks a checkpoint's MLP. Throws FormatError("…: NaN/Inf in WHAT row N") naming matrix and
/// row.
Neurons unpack(const models::DenseMlp& mlp, std::string_view name);

/// A layer while it is being fitted: float32, the n_shared shared neurons first, then the experts'
/// `block` neurons each. Clones of experts stand behind those that they were copied from.
struct Student {
  LayerPlan plan;
  Neurons neurons;                   // [n_shared + block n_experts]
  std::vector<std::int32_t> origin;  // teacher's neuron behind each of ours
  AlignedBuffer<float> mean;         // μ [n]; 0 for shared neurons
  AlignedBuffer<float> router_v;     // [r, d_model]
  AlignedBuffer<float> router_u;     // [n_experts, r]
  AlignedBuffer<float> router_bias;  // [n_experts]
  AlignedBuffer<float> bypass_q;     // [q, d_model]
  AlignedBuffer<float> bypass_p;     // [d_model, q]
  AlignedBuffer<float> bias;         // [d_model]
  // Experts that are clones of each other, in ascending order; none of those that have no clones.
  std::vector<std::vector<std::int32_t>> families;

  std::int64_t n_experts() const { return (neurons.n - plan.n_shared) / plan.block; }
};

/// Single neurons have the fused kernels, blocks of them the general form.
using PackedStudent = std::variant<models::PackedSecretMoe, models::PackedMixture>;
models::Mlp view(const PackedStudent& packed);

/// Packs a student into file formats. Rows are rounded to the formats' grids.
PackedStudent pack(const Student& student, DType expert_dtype, DType router_dtype);

/// Replaces by what the file formats will hold: gate and up rows (jointly, rounding.h, in the
/// metric of `input_factor`, fit.h), router and Q. Not down, P and biases, which are fitted after.
void round_inputs_to(Context& ctx, Student& student, const DMatrix& input_factor,
                     DType expert_dtype, DType router_dtype);

/// h = φ(x W_gateᵀ) ⊙ (x W_upᵀ).   x [m, d_model], h and scratch [m, n]. On return scratch holds x
/// W_upᵀ.
void neuron_activations(Context& ctx, const Neurons& neurons, ConstMatrix x, Matrix h,
                        Matrix scratch);

/// ‖w_down,i‖ of all neurons.
std::vector<float> down_norms(const Neurons& neurons);

/// c_e = √(Σ_{i∈e} ((h_i − μ_i) ‖w_down,i‖)²), the length of what expert e adds where its down rows
/// are orthogonal; of a single neuron it is that length.   h one token's activations and norm
/// [neurons], c [n_experts]
void contributions(const Student& student, std::span<const float> norm, const float* h, float* c);

/// Of the experts that are clones of each other, one answers for a token, the one with the largest
/// score (ties: the lower id): of all ways to share tokens out this leaves the router's regression
/// on c the least error. c becomes 0 for the others.   scores, c [n_experts]
void leave_to_winners(const Student& student, const float* scores, float* c);

/// scores = U (V x) + c, in float32 as the runtime has them.   x [m, d_model], scores [m,
/// n_experts]
void router_scores(Context& ctx, const Student& student, ConstMatrix x, Matrix scores);

/// mask[t, i] = 1 where the router selects expert i for x_t, else 0.   x [m, d_model], scores
/// scratch and mask [m, n_experts] (the same memory is fine).
void select(Context& ctx, const Student& student, ConstMatrix x, Matrix scores, Matrix mask);

}  // namespace moesaic::converter
