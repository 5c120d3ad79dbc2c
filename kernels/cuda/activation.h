#pragma once

#include "kernels/activation.h"
#include "kernels/base/view.h"
#include "kernels/cuda/base/stream.h"

namespace moesaic::cuda {

/// h = φ(gate) ⊙ up.   gate, up, h [n_tokens, d_ff] in device memory; h may be gate or up. Throws
/// ShapeError.
void gated_activation(kernels::Activation phi, ConstMatrix gate, ConstMatrix up, Matrix h,
                      StreamHandle stream);

}  // namespace moesaic::cuda
