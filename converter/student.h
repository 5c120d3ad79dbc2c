#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "converter/linalg.h"
#include "kernels/base/aligned_buffer.h"
#include "kernels/base/context.h"
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
};

/// Multiply-adds of a planned layer over the dense MLP's (DESIGN.md section 1, router and bypass
/// counted): [3 d (n_shared + k) + r (d + n_experts) + 2 q d] / (3 d d_ff); 1 where the layer stays
/// dense.
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

/// A secret-MoE layer while it is being fitted: float32, the n_shared shared neurons first, then
/// the experts.
struct Student {
  LayerPlan plan;
  Neurons neurons;                   // [n_shared + n_experts]
  std::vector<std::int32_t> origin;  // teacher's neuron behind each of ours
  AlignedBuffer<float> mean;         // μ [n]; 0 for shared neurons
  AlignedBuffer<float> router_v;     // [r, d_model]
  AlignedBuffer<float> router_u;     // [n_experts, r]
  AlignedBuffer<float> router_bias;  // [n_experts]
  AlignedBuffer<float> bypass_q;     // [q, d_model]
  AlignedBuffer<float> bypass_p;     // [d_model, q]
  AlignedBuffer<float> bias;         // [d_model]

  std::int64_t n_experts() const { return neurons.n - plan.n_shared; }
};

/// Packs a student into file formats. Rows are rounded to the formats' grids.
models::PackedSecretMoe pack(const Student& student, DType expert_dtype, DType router_dtype);

/// Replaces by what the file formats will hold: gate and up rows (jointly, rounding.h, in the
/// metric of `input_factor`, fit.h), router and Q. Not down, P and biases, which are fitted after.
void round_inputs_to(Context& ctx, Student& student, const DMatrix& input_factor,
                     DType expert_dtype, DType router_dtype);

/// h = φ(x W_gateᵀ) ⊙ (x W_upᵀ).   x [m, d_model], h and scratch [m, n]. On return scratch holds x
/// W_upᵀ.
void neuron_activations(Context& ctx, const Neurons& neurons, ConstMatrix x, Matrix h,
                        Matrix scratch);

/// mask[t, i] = 1 where the router selects expert i for x_t, else 0.   x [m, d_model], scores
/// scratch and mask [m, n_experts] (the same memory is fine).
void select(Context& ctx, const Student& student, ConstMatrix x, Matrix scores, Matrix mask);

}  // namespace moesaic::converter
