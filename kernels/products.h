#pragma once

#include <cstdint>

#include "kernels/base/context.h"
#include "kernels/base/view.h"

namespace moesaic::kernels {

/// Products of host matrices computed elsewhere: what a context's gemm() calls go to, where they
/// are worth the way there and back. Shapes have been checked.
class Products {
 public:
  virtual ~Products() = default;

  /// Whether op(A) [m, k] by op(B) [k, n] of `operand_bytes` an element is worth it.
  virtual bool takes(std::int64_t m, std::int64_t n, std::int64_t k,
                     std::int64_t operand_bytes) const = 0;

  /// gemm() (linear.h) of float32, or of raw bfloat16, sums in float32. The context lends threads.
  /// Throws DeviceError.
  virtual void multiply(Context& ctx, bool trans_a, bool trans_b, float alpha, ConstMatrix a,
                        ConstMatrix b, float beta, Matrix c) = 0;
  virtual void multiply(Context& ctx, bool trans_a, bool trans_b, float alpha,
                        MatrixView<const std::uint16_t> a, MatrixView<const std::uint16_t> b,
                        float beta, Matrix c) = 0;
};

}  // namespace moesaic::kernels
