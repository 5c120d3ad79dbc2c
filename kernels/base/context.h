#pragma once

#include "kernels/base/tally.h"
#include "kernels/base/thread_pool.h"
#include "kernels/base/workspace.h"

namespace moesaic {

namespace kernels {
class Products;
}

/// Precision in which activations enter a matrix product. Sums are float32 in all of them. The
/// residual stream, norms, softmax and the attention cache are float32 in all of them. Q16: with
/// quantised weights that have panels, 16-bit integers with a float32 scale per 32 elements; with
/// BF16 weights that have them, bfloat16; float32 with all others.
enum class Activations { F32, BF16, Q16 };

/// What every kernel call needs from its caller besides tensors: threads, scratch memory, the byte
/// tally, the activation precision and, where products of host matrices may go elsewhere, where to
/// (kernels/products.h). Borrowed; one kernel at a time per context.
struct Context {
  ThreadPool& pool;
  Workspace& workspace;
  Tally& tally;
  Activations activations = Activations::F32;
  kernels::Products* products = nullptr;

  /// The same at another precision.
  Context with(Activations other) const { return {pool, workspace, tally, other, products}; }
};

}  // namespace moesaic
