#pragma once

#include "kernels/base/view.h"
#include "kernels/cuda/base/stream.h"

namespace moesaic::cuda {

/// y_t = x_t / sqrt(mean(x_t²) + eps) ⊙ weight, per row.   x, y [n_rows, d] (may be the same
/// memory), weight [d], in device memory. Throws ShapeError. Source: as kernels/rms_norm.h.
void rms_norm(ConstMatrix x, const float* weight, float eps, Matrix y, StreamHandle stream);

/// x += r, then y = rms_norm(x): what stands between two halves of a layer.   x, r, y [n_rows, d],
/// y distinct from the others. Throws ShapeError.
void add_rms_norm(Matrix x, ConstMatrix r, const float* weight, float eps, Matrix y,
                  StreamHandle stream);

/// x += y.   x, y [n_rows, d]. Throws ShapeError.
void add(ConstMatrix y, Matrix x, StreamHandle stream);

}  // namespace moesaic::cuda
