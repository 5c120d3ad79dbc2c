// Vector exp for the kernels' own files. Included once per instruction set by hwy/foreach_target.h,
// hence the toggled guard in place of #pragma once.
#if defined(MOESAIC_KERNELS_CPU_EXP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MOESAIC_KERNELS_CPU_EXP_INL_H_
#undef MOESAIC_KERNELS_CPU_EXP_INL_H_
#else
#define MOESAIC_KERNELS_CPU_EXP_INL_H_
#endif

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace moesaic::kernels {
namespace HWY_NAMESPACE {

/// e^x for x <= 0, within 1e-7 relative. Below −87.3, where the result would be subnormal, 0. NaN
/// stays NaN, which hwy/contrib/math's Exp turns into 0.
template <class D, class V>
HWY_INLINE V exp_not_positive(D d, V x) {
  namespace hn = hwy::HWY_NAMESPACE;
  const hn::RebindToSigned<D> di;
  const auto lowest = hn::Set(d, -87.3f);
  const auto zero = hn::Lt(x, lowest);
  x = hn::IfThenElse(zero, lowest, x);
  const auto n = hn::Round(hn::Mul(x, hn::Set(d, 1.44269504089f)));
  // ln 2 in two parts; n times the first is exact.
  auto r = hn::NegMulAdd(n, hn::Set(d, 0x1.62e4p-1f), x);
  r = hn::NegMulAdd(n, hn::Set(d, 0x1.7f7d1cp-20f), r);
  // Taylor series on |r| <= ln 2 / 2; the first term left out is below 1e-8.
  auto p = hn::Set(d, 1.0f / 5040);
  p = hn::MulAdd(p, r, hn::Set(d, 1.0f / 720));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0f / 120));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0f / 24));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0f / 6));
  p = hn::MulAdd(p, r, hn::Set(d, 0.5f));
  p = hn::Add(hn::MulAdd(p, hn::Mul(r, r), r), hn::Set(d, 1.0f));
  const auto exponent = hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, n), hn::Set(di, 127)));
  return hn::IfThenZeroElse(zero, hn::Mul(p, hn::BitCast(d, exponent)));
}

}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
HWY_AFTER_NAMESPACE();

#endif
