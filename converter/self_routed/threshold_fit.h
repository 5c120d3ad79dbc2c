#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "converter/fit.h"
#include "converter/self_routed/shares.h"
#include "converter/student.h"
#include "kernels/base/aligned_buffer.h"
#include "kernels/base/context.h"
#include "kernels/self_routed.h"

namespace moesaic::converter {

/// The thresholds of one layer, and the shares that they leave on the text they were fitted on.
struct Thresholds {
  bool up_by_input = false;
  std::vector<float> input, gate, hidden;  // θx [d_model], θg [d_ff] (empty with up_by_input), θh
  Shares shares;

  /// The layer with these thresholds around the dense matrices; borrows both.
  kernels::SelfRoutedView view(const models::DenseMlp& dense) const;
};

/// How thresholds are shaped within a layer.
enum class ThresholdShape {
  ByWeights,  // one bound on |x_j| ‖w_gate,:j‖, on |a_i| rms(u_i) ‖w_down,i‖ and on |h_i|
              // ‖w_down,i‖
  Uniform,    // one bound on |x_j| and one on |h_i| (TEAL, arXiv 2408.14690)
};

/// Thresholds of one layer for given shares, and what they cost, on a sample of its inputs. Keeps
/// the activations of the last two input shares, so that going back and forth between them and
/// trying other shares of neurons is cheap.
class ThresholdFit {
 public:
  /// `sample` and `teacher` are borrowed; sample.y is what the dense layer gives.
  ThresholdFit(Context& ctx, const Neurons& teacher, const LayerSample& sample,
               ThresholdShape shape);

  /// Thresholds whose shares on the sample come closest to those asked for. hidden <= gate <= 1;
  /// with ThresholdShape::Uniform `gate` is not looked at.
  const Thresholds& fit(const Shares& shares);

  /// Error of the last fit: Σ ω‖y − ŷ‖² / Σ ω‖y − ȳ‖².
  double error();

  /// Of the last fit: share of the sample's tokens to whose output each neuron adds.   [d_ff]
  std::vector<float> usage() const;

 private:
  // What depends on the input share alone.
  struct Inputs {
    double asked = -1;
    double share = 1;
    std::vector<float> threshold;
    AlignedBuffer<float> a;  // φ(gate)
    AlignedBuffer<float> u;  // with ThresholdShape::Uniform
  };
  void fit_inputs(double share, Inputs& inputs);
  void fit_neurons(const Shares& shares, const Inputs& inputs);

  Context& ctx_;
  const Neurons& teacher_;
  const LayerSample& sample_;
  ThresholdShape shape_;
  std::vector<float> column_scale_, up_scale_, down_scale_;  // what entries are weighted with
  std::array<Inputs, 2> inputs_;                             // the last one used first
  Thresholds thresholds_;
  AlignedBuffer<float> x_hat_, u_, h_, y_;
};

}  // namespace moesaic::converter
