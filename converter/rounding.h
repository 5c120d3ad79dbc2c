#pragma once

#include "converter/linalg.h"
#include "kernels/base/context.h"
#include "kernels/base/dtype.h"
#include "kernels/base/view.h"

namespace moesaic::converter {

// Rounding to a file format's grid so that products suffer least: what a weight loses is made up
// for by the weights of the same sum that are rounded after it. With the second moments of the
// inputs H = L Lᵀ and coordinates rounded from the last to the first,
//   w_k ← grid(w_k + Σ_{j>k} (w_j − q_j) L_jk / L_kk),
// which minimises tr(ΔᵀHΔ) greedily; for blocks of coordinates that are rounded at once, B and
// those behind it >B,  w_B ← grid(w_B + (w_>B − q_>B) L_{>B,B} L_BB⁻¹). Source: GPTQ (arXiv
// 2210.17323) in the form of LDLQ (QuIP, arXiv 2307.13304, section 3). `l` is the lower Cholesky
// factor of H, of order n or more (the leading n rows are used). Weights that lie on the grid
// already, all of them, stay as they are.

/// Rounds each row for itself, without making up for anything.   w [n, m]
void round_rows(Matrix w, DType dtype);

/// Rounds the columns' coordinates: y = W x, x of moments H.   w [m, n]; whole blocks of columns at
/// a time, since they share a scale.
void round_inputs(Context& ctx, Matrix w, const DMatrix& l, DType dtype);

/// Rounds the rows' coordinates: y = Wᵀ φ, φ of moments H.   w [n, m]
void round_outputs(Context& ctx, Matrix w, const DMatrix& l, DType dtype);

}  // namespace moesaic::converter
