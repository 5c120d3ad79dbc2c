#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "kernels/base/aligned_buffer.h"
#include "kernels/base/context.h"
#include "kernels/base/view.h"
#include "kernels/mixture.h"

/// The papers' students of one layer, trained from a random start: those of the tables (arXiv
/// 2512.18452), and the layers of PEER and sgatlin.
namespace moesaic::converter::study {

/// Who chooses the experts, and what they are.
enum class Family {
  LowRank,   // scores = U (V x) + c, V without a bias
  FullRank,  // scores = U x + c
  Dense,     // nobody: a GELU MLP of as many neurons as the others have active
  Peer,      // product keys (kernels/mixture.h): PEER, arXiv 2407.04153
  Sgatlin,   // product keys, linear neurons, gated by the score itself: arXiv 2606.07414
};
/// Those of the tables.
inline constexpr std::array<Family, 3> kFamilies = {Family::LowRank, Family::FullRank,
                                                    Family::Dense};

/// "low-rank", "full-rank", "dense", "peer", "sgatlin".
std::string_view family_name(Family family);
/// Nothing where the name is none of the tables'.
std::optional<Family> family_from_name(std::string_view name);

/// The layer that a student becomes; of a dense one only the expert says something.
kernels::MixtureKind mixture_kind(Family family);

/// The sizes of a student.
struct StudentShape {
  Family family = Family::Dense;
  std::int64_t d_model = 0;
  std::int64_t n_shared = 0;  // s; all neurons of a dense one
  std::int64_t n_experts = 0;
  std::int64_t n_active = 0;     // k
  std::int64_t router_rank = 0;  // r; 0 for FullRank and Dense

  bool product_keys() const { return family == Family::Peer || family == Family::Sgatlin; }
  /// Keys of a half; n_experts is its square.
  std::int64_t n_keys() const;
  /// Scores that the router computes.
  std::int64_t n_scores() const { return product_keys() ? 2 * n_keys() : n_experts; }
  bool operator==(const StudentShape&) const = default;
};

/// The student with `n_neurons` active ones: half of them shared, half selected (s = k), or, where
/// that is odd, one more shared; all shared where it is dense. Throws InputError where it has no
/// room: fewer than two neurons for a router to select from, more selected than there are experts,
/// no rank, product keys and a number of experts that is no square.
StudentShape student_shape(Family family, std::int64_t d_model, std::int64_t n_neurons,
                           std::int64_t n_experts, std::int64_t router_rank);

/// Per token: 2 d (s + k) of the neurons, the whole router, and k of the gate.
std::int64_t multiply_adds(const StudentShape& shape);

/// y = bias + Σ_{shared} φ(w_in·x + b) w_out + Σ_{i ∈ top-k of the scores} g_i φ(w_in,i·x + b_i)
/// w_out,i, φ GELU (tanh form), g the softmax of the k selected scores. Sgatlin's: φ the identity,
/// no b, g the scores. Also the shape of its own gradients.
struct PaperStudent {
  StudentShape shape;
  AlignedBuffer<float> shared_in, shared_out;  // [n_shared, d_model], a neuron a row
  AlignedBuffer<float> shared_bias;            // b [n_shared]; empty where neurons are linear
  AlignedBuffer<float> expert_in, expert_out;  // [n_experts, d_model]
  AlignedBuffer<float> expert_bias;            // b [n_experts]; likewise
  AlignedBuffer<float> router_v;     // V [router_rank, d_model], or [2 router_rank, d_model]
  AlignedBuffer<float> router_u;     // U [n_scores, router_rank or, at full rank, d_model]
  AlignedBuffer<float> router_bias;  // c [n_scores]
  AlignedBuffer<float> bias;         // [d_model]

  /// All zero.
  explicit PaperStudent(const StudentShape& shape);

  std::int64_t router_cols() const {
    return shape.router_rank > 0 ? shape.router_rank : shape.d_model;
  }
  /// The parameters, always in the same order.
  std::vector<std::span<float>> tensors();
};

/// The papers' random start: rows of w_in uniform in ±1/√d_model, of w_out in ±1/√k (±1/√n_shared
/// in a dense student), router weights and c in ±1/√(their inputs), the neurons' biases zero, the
/// output's bias `output_mean` [d_model]. Throws ShapeError. The same seed gives the same student.
PaperStudent random_start(const StudentShape& shape, std::span<const double> output_mean,
                          std::uint64_t seed);

/// ŷ for all rows of x, in tiles.   x, y [n_tokens, d_model]
void predict(Context& ctx, const PaperStudent& student, ConstMatrix x, Matrix y);

/// L = Σ_t ‖ŷ_t − y_t‖² / (n_tokens · d_model) of a batch, and its gradient with the selection held
/// fixed; what `gradient` held before does not matter. Products with the shared neurons and the
/// router in the precision of ctx.activations; of the experts only those that were selected are
/// computed, in float32. The same batch and thread count give the same bits.
double loss_and_gradient(Context& ctx, const PaperStudent& student, ConstMatrix x, ConstMatrix y,
                         PaperStudent& gradient);

}  // namespace moesaic::converter::study
