#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "converter/recovery/arithmetic.h"
#include "kernels/rope.h"

namespace moesaic::converter {

/// Cosines and sines of windows that begin at position 0.
template <class T>
class RotaryTable {
 public:
  RotaryTable() = default;
  RotaryTable(std::int64_t n_ctx, int head_dim, double base) : half_(head_dim / 2) {
    // The angles as kernels::rope rounds them.
    const std::vector<float> freq = kernels::rope_frequencies(head_dim, base);
    for (std::int64_t position = 0; position < n_ctx; ++position) {
      for (const float f : freq) {
        const double angle = static_cast<float>(position) * f;
        cos_.push_back(static_cast<T>(std::cos(angle)));
        sin_.push_back(static_cast<T>(std::sin(angle)));
      }
    }
  }
  const T* cos(std::int64_t position) const { return cos_.data() + position * half_; }
  const T* sin(std::int64_t position) const { return sin_.data() + position * half_; }
  std::int64_t half() const { return half_; }
  std::int64_t n_ctx() const {
    return half_ == 0 ? 0 : static_cast<std::int64_t>(cos_.size()) / half_;
  }

 private:
  std::int64_t half_ = 0;
  std::vector<T> cos_, sin_;  // [n_ctx, head_dim / 2]
};

/// Rotates each head of row t in place by the angles of position t mod n_ctx, n_ctx being the
/// table's; backwards if `inverse`. A rotation's transpose is its inverse, so that is also the way
/// of the gradient.   x [n, n_heads · head_dim]
template <class T>
void rotate(Context& ctx, const RotaryTable<T>& table, kernels::RopeStyle style, bool inverse,
            MatrixView<T> x) {
  const std::int64_t half = table.half();
  const bool interleaved = style == kernels::RopeStyle::Interleaved;
  for_each_row(ctx, x.rows, [&](std::int64_t t, int) {
    const T* cos = table.cos(t % table.n_ctx());
    const T* sin = table.sin(t % table.n_ctx());
    const T sign = inverse ? T(-1) : T(1);
    for (T* head = x.row(t); head < x.row(t) + x.cols; head += 2 * half) {
      for (std::int64_t i = 0; i < half; ++i) {
        T& a = head[interleaved ? 2 * i : i];
        T& b = head[interleaved ? 2 * i + 1 : i + half];
        const T rotated = a * cos[i] - sign * b * sin[i];
        b = sign * a * sin[i] + b * cos[i];
        a = rotated;
      }
    }
  });
}

}  // namespace moesaic::converter
