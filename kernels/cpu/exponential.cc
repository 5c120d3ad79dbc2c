#include "kernels/exponential.h"

#include "kernels/base/error.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/exponential.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/exp-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moesaic::kernels {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

float exponentials_impl(const float* x, std::size_t n, float shift, float* y) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d);
  const auto shifts = hn::Set(d, shift);
  const auto exponential = [&](auto v) {
    const auto difference = hn::Sub(v, shifts);  // a minimum would lose NaN on some targets
    return exp_not_positive(d, hn::IfThenZeroElse(hn::Gt(difference, hn::Zero(d)), difference));
  };
  auto sum = hn::Zero(d);
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto e = exponential(hn::LoadU(d, x + i));
    hn::StoreU(e, d, y + i);
    sum = hn::Add(sum, e);
  }
  float total = hn::GetLane(hn::SumOfLanes(d, sum));
  if (i == n) return total;
  HWY_ALIGN float rest[hn::MaxLanes(d)] = {};
  for (std::size_t j = i; j < n; ++j) rest[j - i] = x[j];
  hn::Store(exponential(hn::Load(d, rest)), d, rest);
  for (std::size_t j = i; j < n; ++j) total += y[j] = rest[j - i];
  return total;
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moesaic::kernels {

HWY_EXPORT(exponentials_impl);

float exponentials(std::span<const float> x, float shift, std::span<float> y) {
  require<ShapeError>(x.size() == y.size(), "exponentials: {} elements into {}", x.size(),
                      y.size());
  return HWY_DYNAMIC_DISPATCH(exponentials_impl)(x.data(), x.size(), shift, y.data());
}

}  // namespace moesaic::kernels
#endif  // HWY_ONCE
