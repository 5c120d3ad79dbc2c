#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "converter/recovery/moe.h"

namespace moesaic::converter {

/// Running moments behind a router's closed-form fit, exponentially forgotten so that they follow
/// neurons that move: with x̃ = (x, 1),  Σ decay^age ω x̃ x̃ᵀ and Σ decay^age ω x̃ cᵀ.
class RouterMoments {
 public:
  explicit RouterMoments(const MoeShape& shape);

  /// What there was fades by `decay`, then rows are added.   x [n, d_model], c [n, n_experts] raw
  /// bfloat16, weight ω [n]
  void add(Context& ctx, double decay, MatrixView<const std::uint16_t> x,
           MatrixView<const std::uint16_t> c, std::span<const float> weight);

  /// Replaces V, U and c of the router by the weighted least squares regression of c on x of the
  /// router's rank (linalg.h), an intercept included. On the calling thread.
  void refit(double ridge, MoeParameters<float>& parameters) const;

  // [(d_model + 1)²] and [(d_model + 1) · n_experts]: what a resumed training needs back.
  std::span<float> xx() { return xx_.span(); }
  std::span<float> xc() { return xc_.span(); }

 private:
  MoeShape shape_;
  AlignedBuffer<float> xx_, xc_;
};

}  // namespace moesaic::converter
