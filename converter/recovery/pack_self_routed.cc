#include "converter/recovery/pack_self_routed.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "converter/kth_largest.h"
#include "converter/recovery/pack_matrix.h"
#include "kernels/base/error.h"
#include "kernels/linear.h"
#include "kernels/quant.h"

namespace moesaic::converter {
namespace {

template <class T>
AlignedBuffer<float> copy(const T& from) {
  AlignedBuffer<float> to(from.size());
  std::copy(from.begin(), from.end(), to.begin());
  return to;
}

AlignedBuffer<float> scaled(const std::vector<float>& threshold, float factor) {
  AlignedBuffer<float> to = copy(threshold);
  for (float& v : to) v *= factor;
  return to;
}

// kept = v where |v| >= θ, else 0; kept may be v.
void keep(Context& ctx, ConstMatrix v, std::span<const float> threshold, Matrix kept) {
  for_each_row(ctx, v.rows, [&](std::int64_t t, int) {
    for (std::int64_t i = 0; i < v.cols; ++i) {
      const float value = v.row(t)[i];
      kept.row(t)[i] = std::abs(value) >= threshold[static_cast<std::size_t>(i)] ? value : 0.0F;
    }
  });
}

Matrix take_copy(Context& ctx, ConstMatrix from) {
  const Matrix to = take_matrix<float>(ctx, from.rows, from.cols);
  std::copy_n(from.data, from.rows * from.cols, to.data);
  return to;
}

}  // namespace

float factor_for_share(Context& ctx, Matrix v, std::span<const float> threshold, double share) {
  const std::int64_t n = v.rows * v.cols;
  const auto wanted = static_cast<std::int64_t>(share * static_cast<double>(n));
  for_each_row(ctx, v.rows, [&](std::int64_t t, int) {
    float* row = v.row(t);
    for (std::int64_t i = 0; i < v.cols; ++i) {
      const float bound = threshold[static_cast<std::size_t>(i)];
      const float ratio =
          bound > 0 ? std::abs(row[i]) / bound : std::numeric_limits<float>::infinity();
      row[i] = std::isnan(ratio) ? 0 : ratio;  // NaN is below every threshold
    }
  });
  if (n == 0) return 1;
  const std::span<const float> ratios(v.data, static_cast<std::size_t>(n));
  const float factor = kth_largest(ctx, ratios, std::clamp<std::int64_t>(wanted, 1, n));
  if (std::isinf(factor)) return 1;
  return wanted > 0 ? factor : std::nextafter(factor, std::numeric_limits<float>::max());
}

MatrixTypes types_of(const kernels::SelfRoutedView& layer) {
  return {layer.w_gate.dtype, layer.w_up.dtype, layer.w_down.dtype};
}

MatrixTypes writable_types(const kernels::SelfRoutedView& layer, std::optional<DType> wanted) {
  return {writable_type(layer.w_gate.dtype, wanted, layer.d_model()),
          writable_type(layer.w_up.dtype, wanted, layer.d_model()),
          writable_type(layer.w_down.dtype, wanted, layer.d_ff())};
}

PackMatrix by_rounding(Context& ctx, const MatrixTypes& types) {
  return [&ctx, types](std::size_t m, Matrix w, const std::function<DMatrix()>& moments) {
    return round_and_pack(ctx, w, moments(), types[m]);
  };
}

models::PackedSelfRouted pack_self_routed(Context& ctx, const TrainedSelfRouted<Bfloat16>& trained,
                                          const MatrixTypes& types, const PackMatrix& pack,
                                          ConstMatrix x, std::span<const float> weight) {
  const Workspace::Scope scope(ctx.workspace);
  const SelfRoutedShape& s = trained.layer.shape();
  const SelfRoutedParameters<float>& p = *trained.parameters;
  const SelfRoutedThresholds<float>& thresholds = trained.layer.thresholds();
  models::PackedSelfRouted out;
  out.phi = s.phi;
  out.up_by_input = s.up_by_input;
  out.d_model = s.d_model;
  out.d_ff = s.d_ff;
  out.gate_dtype = types[0];
  out.up_dtype = types[1];
  out.down_dtype = types[2];
  out.input_share = trained.target[kInput];
  out.gate_share = trained.target[kGate];
  out.hidden_share = trained.target[kHidden];

  const Matrix large = take_copy(ctx, x);
  const float input_factor = factor_for_share(ctx, large, thresholds.input, out.input_share);
  out.input_threshold = scaled(thresholds.input, input_factor);
  keep(ctx, x, out.input_threshold.span(), large);
  std::optional<DMatrix> large_factor;
  const auto large_moments = [&] {
    if (!large_factor) large_factor = second_moments(ctx, large, weight);
    return *large_factor;
  };

  AlignedBuffer<float> w_gate = copy(p.w_gate);
  out.w_gate = pack(0, {w_gate.data(), s.d_ff, s.d_model}, large_moments);
  AlignedBuffer<float> w_up = copy(p.w_up);
  out.w_up = pack(1, {w_up.data(), s.d_ff, s.d_model},
                  [&] { return s.up_by_input ? large_moments() : second_moments(ctx, x, weight); });

  const Matrix gate = take_matrix<float>(ctx, x.rows, s.d_ff);
  const Matrix h = take_matrix<float>(ctx, x.rows, s.d_ff);
  const Matrix scratch = take_matrix<float>(ctx, x.rows, s.d_ff);
  kernels::gemm(ctx, false, true, 1, large, matrix(std::as_const(w_gate), s.d_ff, s.d_model), 0,
                gate);
  kernels::gemm(ctx, false, true, 1, s.up_by_input ? ConstMatrix(large) : x,
                matrix(std::as_const(w_up), s.d_ff, s.d_model), 0, h);
  for_each_row(ctx, x.rows, [&](std::int64_t t, int) {
    activation_slope(s.phi, gate.row(t), s.d_ff, gate.row(t), scratch.row(t));
  });
  if (!s.up_by_input) {
    std::copy_n(gate.data, gate.rows * gate.cols, scratch.data);
    const float factor = factor_for_share(ctx, scratch, thresholds.gate, out.gate_share);
    out.gate_threshold = scaled(thresholds.gate, factor);
    keep(ctx, gate, out.gate_threshold.span(), gate);
  }
  for_each_row(ctx, x.rows, [&](std::int64_t t, int) {
    for (std::int64_t i = 0; i < s.d_ff; ++i) h.row(t)[i] *= gate.row(t)[i];
  });
  std::copy_n(h.data, h.rows * h.cols, scratch.data);
  const float hidden_factor = factor_for_share(ctx, scratch, thresholds.hidden, out.hidden_share);
  out.hidden_threshold = scaled(thresholds.hidden, hidden_factor);
  keep(ctx, h, out.hidden_threshold.span(), h);

  AlignedBuffer<float> w_down = copy(p.w_down);
  out.w_down =
      pack(2, {w_down.data(), s.d_model, s.d_ff}, [&] { return second_moments(ctx, h, weight); });
  return out;
}

}  // namespace moesaic::converter
