#pragma once

#include <cmath>
#include <cstdint>
#include <span>

#include "converter/recovery/arithmetic.h"

namespace moesaic::converter {

/// y_t = x_t / √(mean(x_t²) + eps) ⊙ weight (kernels/rms_norm.h).   x, y [n, d]; y may be x.
template <class T>
void norm_forward(Context& ctx, MatrixView<const T> x, std::span<const T> weight, T eps,
                  MatrixView<T> y) {
  const std::int64_t d = x.cols;
  for_each_row(ctx, x.rows, [&](std::int64_t t, int) {
    const T* from = x.row(t);
    T* to = y.row(t);
    T square = 0;
    for (std::int64_t i = 0; i < d; ++i) square += from[i] * from[i];
    const T scale = 1 / std::sqrt(square / static_cast<T>(d) + eps);
    for (std::int64_t i = 0; i < d; ++i) {
      to[i] = from[i] * scale * weight[static_cast<std::size_t>(i)];
    }
  });
}

/// ∂L/∂x of norm_forward, given dy = ∂L/∂y: with s = 1/√(mean(x²) + eps) and g = weight ⊙ dy,
///   dx = s g − s³ (g·x)/d x;   dx = …, or dx += … with `accumulate`.
/// dx may be dy. The weight stays as it is.   x, dy, dx [n, d]
template <class T>
void norm_backward(Context& ctx, MatrixView<const T> x, std::span<const T> weight, T eps,
                   MatrixView<const T> dy, bool accumulate, MatrixView<T> dx) {
  const std::int64_t d = x.cols;
  for_each_row(ctx, x.rows, [&](std::int64_t t, int) {
    const T* from = x.row(t);
    const T* gradient = dy.row(t);
    T* to = dx.row(t);
    T square = 0;
    T product = 0;
    for (std::int64_t i = 0; i < d; ++i) {
      square += from[i] * from[i];
      product += from[i] * gradient[i] * weight[static_cast<std::size_t>(i)];
    }
    const T scale = 1 / std::sqrt(square / static_cast<T>(d) + eps);
    const T back = scale * scale * scale * product / static_cast<T>(d);
    for (std::int64_t i = 0; i < d; ++i) {
      const T value = scale * weight[static_cast<std::size_t>(i)] * gradient[i] - back * from[i];
      to[i] = accumulate ? to[i] + value : value;
    }
  });
}

}  // namespace moesaic::converter
