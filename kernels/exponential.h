#pragma once

#include <span>

namespace moesaic::kernels {

/// y_i = e^min(x_i − shift, 0), and their sum: softmax with the maximum (or the log-sum-exp) taken
/// off. Differences below −87.3 give 0. x and y of one length, the same memory is fine; on the
/// calling thread. Throws ShapeError.
float exponentials(std::span<const float> x, float shift, std::span<float> y);

}  // namespace moesaic::kernels
