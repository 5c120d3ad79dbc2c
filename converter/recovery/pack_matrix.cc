#include "converter/recovery/pack_matrix.h"

#include "converter/recovery/moments.h"
#include "converter/rounding.h"
#include "kernels/base/error.h"
#include "kernels/linear.h"
#include "kernels/quant.h"

namespace moesaic::converter {

DType writable_type(DType own, std::optional<DType> wanted, std::int64_t cols) {
  const auto fits = [&](DType t) {
    return kernels::can_quantize(t) && cols % traits(t).block_elems == 0;
  };
  if (wanted) {
    require<InputError>(fits(*wanted), "--expert-type: {} cannot hold rows of {} weights",
                        traits(*wanted).name, cols);
    return *wanted;
  }
  if (fits(own)) return own;
  return fits(DType::Q8_0) ? DType::Q8_0 : DType::BF16;
}

DMatrix second_moments(Context& ctx, ConstMatrix x, std::span<const float> weight) {
  const Workspace::Scope scope(ctx.workspace);
  const auto operand = take_matrix<std::uint16_t>(ctx, x.rows, x.cols);
  to_operand(ctx, x, operand);
  const auto weighted = take_weighted(ctx, operand, weight, false);
  AlignedBuffer<float> moments(static_cast<std::size_t>(x.cols * x.cols));
  kernels::gemm(ctx, true, false, 1, weighted, weighted, 0, {moments.data(), x.cols, x.cols});
  return moment_factor(moments, x.cols);
}

AlignedBuffer<std::byte> round_and_pack(Context& ctx, Matrix w, const DMatrix& moments,
                                        DType dtype) {
  round_inputs(ctx, w, moments, dtype);
  const std::int64_t bytes = row_bytes(dtype, w.cols);
  AlignedBuffer<std::byte> out(static_cast<std::size_t>(w.rows * bytes));
  for_each_row(ctx, w.rows, [&](std::int64_t r, int) {
    kernels::quantize_row(dtype, {w.row(r), static_cast<std::size_t>(w.cols)},
                          out.data() + r * bytes);
  });
  return out;
}

}  // namespace moesaic::converter
