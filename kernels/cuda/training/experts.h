#pragma once

#include <cstdint>

#include "kernels/activation.h"
#include "kernels/base/view.h"
#include "kernels/cuda/base/stream.h"

// Experts behind a router under training: what lies between the products, forward and back. Where
// two forms stand, one is for products of float32, one for those of bfloat16. Rows lie without
// gaps.
namespace moesaic::cuda {

/// The router's choice: scores += bias, then mask = 1 for the k largest of a row as kernels::top_k
/// chooses them, 0 for the others.   scores, mask [n, n_experts], bias [n_experts]; ids [n, k],
/// scratch. Throws ShapeError.
void choose_experts(const float* bias, std::int64_t k, Matrix scores, std::int32_t* ids,
                    std::uint8_t* mask, StreamHandle stream);

/// norm_i = ‖w_i‖.   w [n, d], norm [n]
void row_norms(ConstMatrix w, float* norm, StreamHandle stream);

/// Gated neurons in device memory: the shared ones first, then `block` of each expert.
struct ExpertNeurons {
  kernels::Activation phi = kernels::Activation::Silu;
  std::int64_t n_shared = 0;
  std::int64_t block = 1;
  const float* mean = nullptr;  // μ [neurons]
  const float* norm = nullptr;  // ‖w_down,i‖ [neurons]
  // Experts that are clones of each other: those of family j are members[begin[j]] to
  // members[begin[j + 1] − 1]; family [n_experts] of each, −1: none. Null: no clones.
  const std::int32_t* family = nullptr;
  const std::int32_t* begin = nullptr;
  const std::int32_t* members = nullptr;
};

/// What a token's neurons leave for the products behind them and for the way back.
template <class T>
struct ExpertTape {
  T* f = nullptr;           // [n, neurons] h = φ(g) u, of experts mask ⊙ (h − μ)
  T* slope_gate = nullptr;  // [n, neurons] ∂f/∂g
  T* slope_up = nullptr;    // [n, neurons] ∂f/∂u
  // [n, n_experts] scores − c: c_e = √(Σ_{i∈e} ((h_i − μ_i) ‖w_down,i‖)²), of clones the winner's
  // alone, the one with the largest score (ties: the first member)
  T* gap = nullptr;
  T* centred = nullptr;           // [n, n_experts] h − μ of experts of one neuron, or null
  double* squared_gap = nullptr;  // [n] ‖scores − c‖², before gap is rounded
};

/// From the products g = W_gate x and u = W_up x.   gate, up [n, neurons], scores, mask
/// [n, n_experts] of choose_experts(). In float32 slope_gate may be gate, slope_up up. Throws
/// ShapeError.
void expert_slopes(const ExpertNeurons& neurons, ConstMatrix gate, ConstMatrix up,
                   ConstMatrix scores, const std::uint8_t* mask, const ExpertTape<float>& tape,
                   StreamHandle stream);
void expert_slopes(const ExpertNeurons& neurons, ConstMatrix gate, ConstMatrix up,
                   ConstMatrix scores, const std::uint8_t* mask,
                   const ExpertTape<std::uint16_t>& tape, StreamHandle stream);

/// κ of a straight-through gate (converter/recovery/moe.h): max(0, 1 − |s − θ| / w) / w, θ midway
/// between the least score chosen and the largest other one, w = `width` standard deviations of the
/// row's scores.   scores, mask as above, 0 < k < n_experts of them chosen; kappa [n, n_experts]
void gate_slopes(ConstMatrix scores, const std::uint8_t* mask, float width, std::uint16_t* kappa,
                 StreamHandle stream);

/// A straight-through gate's share in ∂L/∂scores: share · κ_i (e_i − ē), e = df ⊙ centred, ē the
/// κ-weighted mean of e.   df [n, n_experts], rows df_stride apart. share 0: none.
struct StraightThrough {
  float share = 0;
  const float* df = nullptr;
  std::int64_t df_stride = 0;
  const std::uint16_t* centred = nullptr;
  const std::uint16_t* kappa = nullptr;
};

/// The gap becomes ∂L/∂scores of unit · Σ_t ω_t gap_t² / 2, and a gate's share.   gap
/// [n, n_experts], weight ω [n]
void score_gradients(const float* weight, double unit, MatrixView<float> gap, StreamHandle stream);
void score_gradients(const float* weight, double unit, const StraightThrough& gate,
                     MatrixView<std::uint16_t> gap, StreamHandle stream);

/// Of the loss unit · Σ_t ω_t ‖ŷ_t + bias − y_t‖² / 2: ŷ becomes its gradient in ŷ, squared the
/// ‖ŷ_t + bias − y_t‖².   y, y_hat [n, d], bias [d], weight ω, squared [n]. Throws ShapeError.
void output_gradients(const float* bias, ConstMatrix y, const float* weight, double unit,
                      Matrix y_hat, double* squared, StreamHandle stream);

/// *total += unit Σ_t ω_t v_t, always in one order.   values, weight [n]
void add_weighted(const double* values, const float* weight, std::int64_t n, double unit,
                  double* total, StreamHandle stream);

/// sums_j += Σ_t m_t,j, always in one order.   m [n, d], sums [d]
void add_rows(ConstMatrix m, float* sums, StreamHandle stream);
void add_rows(MatrixView<const std::uint16_t> m, float* sums, StreamHandle stream);

/// m_t += bias.   m [n, d], bias [d]. Throws ShapeError.
void add_bias(const float* bias, Matrix m, StreamHandle stream);

/// to_t = from_(ids_t).   from [any, d], ids [n], to [n, d]. Throws ShapeError.
void gather_rows(ConstMatrix from, const std::int32_t* ids, Matrix to, StreamHandle stream);

/// ω_t = 1 / (‖r_t‖² + 1e-20), times d / (‖y_t‖² + 1e-20) unless y holds no data, then scaled to
/// mean 1 over the rows.   r, y [n, d], weight [n]
void token_weights(ConstMatrix r, ConstMatrix y, float* weight, StreamHandle stream);

}  // namespace moesaic::cuda
