#include "kernels/activation.h"

#include <cmath>

#include "kernels/base/error.h"
#include "kernels/cpu/row_split.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/activation.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/exp-inl.h"

// Both activations are x · σ(z): SiLU with z = x, and GELU with z = 2√(2/π)(x + 0.044715x³), since
// ½(1 + tanh u) = σ(2u). With e = exp(−|z|), σ(z) is 1/(1 + e) or e/(1 + e): no cancellation and no
// overflow. −∞ gives −0, the limit.

HWY_BEFORE_NAMESPACE();
namespace moesaic::kernels {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using Tag = hn::ScalableTag<float>;
using Vec = hn::Vec<Tag>;

template <Activation kPhi>
HWY_INLINE Vec activate_lanes(Vec x) {
  const Tag d;
  Vec z = x;
  if constexpr (kPhi == Activation::GeluTanh) {
    const Vec slope =
        hn::MulAdd(hn::Mul(x, x), hn::Set(d, 0.0713548162726f), hn::Set(d, 1.5957691216057308f));
    z = hn::Mul(x, slope);
  }
  const Vec one = hn::Set(d, 1.0f);
  const Vec e = exp_not_positive(d, hn::Neg(hn::Abs(z)));
  const Vec numerator = hn::IfThenElse(hn::Lt(z, hn::Zero(d)), e, one);
  const Vec floor = hn::Set(d, -100.0f);  // e is 0 there; keeps ∞ · 0 out
  const Vec bounded = hn::IfThenElse(hn::Lt(x, floor), floor, x);
  return hn::Mul(bounded, hn::Div(numerator, hn::Add(one, e)));
}

// φ(x) and φ'(x) = σ(z) + x z' σ(z)(1 − σ(z)), the last factor as e/(1 + e)²: no cancellation.
template <Activation kPhi>
HWY_INLINE void slope_lanes(Vec x, Vec& value, Vec& slope) {
  const Tag d;
  const Vec limit = hn::Set(d, 100.0f);  // e is 0 beyond, on both sides
  const Vec floor = hn::Neg(limit);
  const Vec bounded = hn::IfThenElse(hn::Lt(x, floor), floor, x);
  const Vec inner = hn::IfThenElse(hn::Gt(bounded, limit), limit, bounded);
  const Vec one = hn::Set(d, 1.0f);
  Vec z = inner;
  Vec z_slope = one;
  if constexpr (kPhi == Activation::GeluTanh) {
    const Vec square = hn::Mul(inner, inner);
    const Vec root = hn::Set(d, 1.5957691216057308f);
    z = hn::Mul(inner, hn::MulAdd(square, hn::Set(d, 0.0713548162726f), root));
    z_slope = hn::MulAdd(square, hn::Set(d, 3 * 0.0713548162726f), root);
  }
  const Vec e = exp_not_positive(d, hn::Neg(hn::Abs(z)));
  const Vec inverse = hn::Div(one, hn::Add(one, e));
  const Vec sigma = hn::Mul(hn::IfThenElse(hn::Lt(z, hn::Zero(d)), e, one), inverse);
  const Vec sigma_slope = hn::Mul(e, hn::Mul(inverse, inverse));
  value = hn::Mul(bounded, sigma);
  slope = hn::MulAdd(hn::Mul(inner, z_slope), sigma_slope, sigma);
}

template <Activation kPhi>
HWY_INLINE void slope_row(const float* x, std::size_t n, float* value, float* slope) {
  const Tag d;
  const std::size_t lanes = hn::Lanes(d);
  Vec v, s;
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    slope_lanes<kPhi>(hn::LoadU(d, x + i), v, s);
    hn::StoreU(v, d, value + i);
    hn::StoreU(s, d, slope + i);
  }
  if (i == n) return;
  // The rest through padded vectors, so that an element's value does not depend on its place.
  HWY_ALIGN float rest[hn::MaxLanes(d)] = {};
  HWY_ALIGN float rest_slope[hn::MaxLanes(d)] = {};
  for (std::size_t j = i; j < n; ++j) rest[j - i] = x[j];
  slope_lanes<kPhi>(hn::Load(d, rest), v, s);
  hn::Store(v, d, rest);
  hn::Store(s, d, rest_slope);
  for (std::size_t j = i; j < n; ++j) {
    value[j] = rest[j - i];
    slope[j] = rest_slope[j - i];
  }
}

void silu_slope_row(const float* x, std::size_t n, float* value, float* slope) {
  slope_row<Activation::Silu>(x, n, value, slope);
}

void gelu_slope_row(const float* x, std::size_t n, float* value, float* slope) {
  slope_row<Activation::GeluTanh>(x, n, value, slope);
}

// h = φ(gate) ⊙ up, or φ(gate) where up is null.
template <Activation kPhi>
HWY_INLINE void gated_row(const float* gate, const float* up, std::size_t n, float* h) {
  const Tag d;
  const std::size_t lanes = hn::Lanes(d);
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const Vec phi = activate_lanes<kPhi>(hn::LoadU(d, gate + i));
    hn::StoreU(up == nullptr ? phi : hn::Mul(phi, hn::LoadU(d, up + i)), d, h + i);
  }
  if (i == n) return;
  // The rest through a padded vector, so that an element's value does not depend on its place.
  HWY_ALIGN float rest[hn::MaxLanes(d)] = {};
  for (std::size_t j = i; j < n; ++j) rest[j - i] = gate[j];
  hn::Store(activate_lanes<kPhi>(hn::Load(d, rest)), d, rest);
  for (std::size_t j = i; j < n; ++j) h[j] = up == nullptr ? rest[j - i] : rest[j - i] * up[j];
}

void silu_row(const float* gate, const float* up, std::size_t n, float* h) {
  gated_row<Activation::Silu>(gate, up, n, h);
}

void gelu_row(const float* gate, const float* up, std::size_t n, float* h) {
  gated_row<Activation::GeluTanh>(gate, up, n, h);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moesaic::kernels {

HWY_EXPORT(silu_row);
HWY_EXPORT(gelu_row);
HWY_EXPORT(silu_slope_row);
HWY_EXPORT(gelu_slope_row);

float activate(Activation phi, float x) {
  double z = x;
  if (phi == Activation::GeluTanh) z *= 1.5957691216057308 + 0.07135481627260025 * z * z;
  const float e = std::exp(static_cast<float>(-std::fabs(z)));
  const float bounded = x < -1e4f ? -1e4f : x;
  return bounded * ((z < 0 ? e : 1.0f) / (1.0f + e));
}

void gated_activation(Context& ctx, Activation phi, ConstMatrix gate, ConstMatrix up, Matrix h) {
  require<ShapeError>(
      gate.rows == up.rows && gate.cols == up.cols && gate.rows == h.rows && gate.cols == h.cols,
      "activation: gate is [{}, {}], up is [{}, {}], output is [{}, {}], expected the same shape",
      gate.rows, gate.cols, up.rows, up.cols, h.rows, h.cols);
  const auto row =
      phi == Activation::Silu ? HWY_DYNAMIC_DISPATCH(silu_row) : HWY_DYNAMIC_DISPATCH(gelu_row);
  for_rows(ctx, gate.rows, gate.cols, [&](Range rows, int) {
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      row(gate.row(t), up.row(t), static_cast<std::size_t>(gate.cols), h.row(t));
    }
  });
}

void activation(Activation phi, std::span<const float> x, std::span<float> value) {
  require<ShapeError>(value.size() == x.size(),
                      "activation: {} elements and {} values, expected as many", x.size(),
                      value.size());
  const auto row =
      phi == Activation::Silu ? HWY_DYNAMIC_DISPATCH(silu_row) : HWY_DYNAMIC_DISPATCH(gelu_row);
  row(x.data(), nullptr, x.size(), value.data());
}

void activation_slope(Activation phi, std::span<const float> x, std::span<float> value,
                      std::span<float> slope) {
  require<ShapeError>(value.size() == x.size() && slope.size() == x.size(),
                      "activation: {} elements, {} values and {} slopes, expected as many of each",
                      x.size(), value.size(), slope.size());
  const auto row = phi == Activation::Silu ? HWY_DYNAMIC_DISPATCH(silu_slope_row)
                                           : HWY_DYNAMIC_DISPATCH(gelu_slope_row);
  row(x.data(), x.size(), value.data(), slope.data());
}

}  // namespace moesaic::kernels
#endif  // HWY_ONCE
