#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "converter/recovery/arithmetic.h"
#include "kernels/self_routed.h"

namespace moesaic::converter {

/// Sizes of a self-routed layer (kernels/self_routed.h).
struct SelfRoutedShape {
  kernels::Activation phi = kernels::Activation::Silu;
  bool up_by_input = false;
  std::int64_t d_model = 0;
  std::int64_t d_ff = 0;
};

/// All that training changes in such a layer; also its gradient.
template <class T>
struct SelfRoutedParameters {
  AlignedBuffer<T> w_gate, w_up;  // [d_ff, d_model]
  AlignedBuffer<T> w_down;        // [d_model, d_ff]

  SelfRoutedParameters() = default;
  /// Zero throughout.
  explicit SelfRoutedParameters(const SelfRoutedShape& shape);

  /// The tensors in the order above; there is no router beside them.
  std::vector<std::span<T>> tensors();
  static constexpr std::size_t kTensors = 3;
  static constexpr std::size_t kFirstOfRouter = kTensors;
  static constexpr std::array<const char*, kTensors> kNames = {"gate", "up", "down"};
};

/// Its three threshold vectors, and one value for each of them: a factor, a share.
template <class T>
struct SelfRoutedThresholds {
  std::vector<T> input;   // θx [d_model]
  std::vector<T> gate;    // θg [d_ff]; empty with up_by_input
  std::vector<T> hidden;  // θh [d_ff]
};
enum SelfRoutedVector : std::size_t { kInput, kGate, kHidden };
using SelfRoutedTriple = std::array<float, 3>;  // by SelfRoutedVector

/// Columns, routed and kept neurons that tokens had.
struct SelfRoutedCounts {
  std::int64_t tokens = 0, inputs = 0, routed = 0, kept = 0;

  void add(const SelfRoutedCounts& other);
  /// Means per token, over d_model or d_ff; 0 where no token was counted.
  SelfRoutedTriple shares(const SelfRoutedShape& shape) const;
  /// Mean per token, of at least one.
  double multiply_adds(const SelfRoutedShape& shape) const;
};

/// What the way back needs from the way forward.
template <class P>
struct SelfRoutedTape {
  Storage<typename P::Operand> x, large;  // [n, d_model] x and x̂
  Storage<std::uint32_t> large_marks;     // [n, ⌈d_model / 32⌉] bits, where x̂ is x
  Storage<typename P::Operand> h;         // [n, d_ff]
  Storage<typename P::Operand> slope_gate, slope_up;  // [n, d_ff] ∂h/∂(gate·x̂), ∂h/∂(up·x)
  SelfRoutedCounts counts;                            // of its tokens
};

/// One layer: parameters (borrowed), their operands, and its thresholds.
template <class P>
class SelfRoutedLayer {
 public:
  using Scalar = typename P::Scalar;
  using Operand = typename P::Operand;

  /// Throws ShapeError where the thresholds do not fit.
  SelfRoutedLayer(const SelfRoutedShape& shape, SelfRoutedParameters<Scalar>& parameters,
                  SelfRoutedThresholds<Scalar> thresholds);

  /// Takes parameters and factors over after they changed.
  void refresh(Context& ctx);

  /// y = the layer's output.   x, y [n, d_model]
  void forward(Context& ctx, MatrixView<const Scalar> x, SelfRoutedTape<P>& tape,
               MatrixView<Scalar> y) const;

  /// Gradients of L given dy = ∂L/∂y, the masks constant: added to `gradient`; dx = ∂L/∂x, if asked
  /// for (dx.data not null), is overwritten. With `straight_through` dx passes the inputs that were
  /// left out as if they were not (arXiv 2407.10969).
  void backward(Context& ctx, bool straight_through, MatrixView<const Scalar> dy,
                SelfRoutedTape<P>& tape, SelfRoutedParameters<Scalar>& gradient,
                MatrixView<Scalar> dx) const;

  const SelfRoutedShape& shape() const { return shape_; }
  SelfRoutedParameters<Scalar>& parameters() const { return parameters_; }

  /// The thresholds in force are those given times one factor for each vector.
  const SelfRoutedThresholds<Scalar>& thresholds() const { return thresholds_; }
  const SelfRoutedThresholds<Scalar>& given() const { return given_; }
  void set_thresholds(SelfRoutedThresholds<Scalar> thresholds);  // the factors become 1
  SelfRoutedTriple& factors() { return factors_; }

 private:
  SelfRoutedShape shape_;
  SelfRoutedParameters<Scalar>& parameters_;
  SelfRoutedThresholds<Scalar> given_, thresholds_;
  SelfRoutedTriple factors_ = {1, 1, 1};
  Storage<Operand> w_gate_, w_up_, w_down_;
};

}  // namespace moesaic::converter
