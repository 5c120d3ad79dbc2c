#include "kernels/gathered_rows.h"

#include "kernels/base/error.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/gathered_rows.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace moesaic::kernels {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using Tag = hn::ScalableTag<float>;
using Vec = hn::Vec<Tag>;

// Four rows at a time: a's vectors are loaded once for all of them, and four sums hide the latency
// of the multiply-add.
void dots_impl(const float* a, std::int64_t cols, const float* m, std::int64_t stride,
               const std::int32_t* rows, std::int64_t n_rows, float* dots) {
  const Tag d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const std::int64_t whole = cols / lanes * lanes;
  std::int64_t e = 0;
  for (; e + 4 <= n_rows; e += 4) {
    const float* r0 = m + rows[e] * stride;
    const float* r1 = m + rows[e + 1] * stride;
    const float* r2 = m + rows[e + 2] * stride;
    const float* r3 = m + rows[e + 3] * stride;
    Vec s0 = hn::Zero(d);
    Vec s1 = s0;
    Vec s2 = s0;
    Vec s3 = s0;
    for (std::int64_t c = 0; c < whole; c += lanes) {
      const Vec v = hn::LoadU(d, a + c);
      s0 = hn::MulAdd(v, hn::LoadU(d, r0 + c), s0);
      s1 = hn::MulAdd(v, hn::LoadU(d, r1 + c), s1);
      s2 = hn::MulAdd(v, hn::LoadU(d, r2 + c), s2);
      s3 = hn::MulAdd(v, hn::LoadU(d, r3 + c), s3);
    }
    dots[e] = hn::GetLane(hn::SumOfLanes(d, s0));
    dots[e + 1] = hn::GetLane(hn::SumOfLanes(d, s1));
    dots[e + 2] = hn::GetLane(hn::SumOfLanes(d, s2));
    dots[e + 3] = hn::GetLane(hn::SumOfLanes(d, s3));
    for (std::int64_t c = whole; c < cols; ++c) {
      dots[e] += a[c] * r0[c];
      dots[e + 1] += a[c] * r1[c];
      dots[e + 2] += a[c] * r2[c];
      dots[e + 3] += a[c] * r3[c];
    }
  }
  for (; e < n_rows; ++e) {
    const float* row = m + rows[e] * stride;
    Vec s = hn::Zero(d);
    for (std::int64_t c = 0; c < whole; c += lanes) {
      s = hn::MulAdd(hn::LoadU(d, a + c), hn::LoadU(d, row + c), s);
    }
    dots[e] = hn::GetLane(hn::SumOfLanes(d, s));
    for (std::int64_t c = whole; c < cols; ++c) dots[e] += a[c] * row[c];
  }
}

// Eight vectors of columns stay in registers while all rows pass.
void sum_impl(const float* scale, const float* m, std::int64_t stride, const std::int32_t* rows,
              std::int64_t n_rows, std::int64_t cols, bool accumulate, float* sum) {
  const Tag d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const auto start = [&](std::int64_t c) {
    return accumulate ? hn::LoadU(d, sum + c) : hn::Zero(d);
  };
  std::int64_t c = 0;
  for (; c + 8 * lanes <= cols; c += 8 * lanes) {
    Vec s0 = start(c);
    Vec s1 = start(c + lanes);
    Vec s2 = start(c + 2 * lanes);
    Vec s3 = start(c + 3 * lanes);
    Vec s4 = start(c + 4 * lanes);
    Vec s5 = start(c + 5 * lanes);
    Vec s6 = start(c + 6 * lanes);
    Vec s7 = start(c + 7 * lanes);
    for (std::int64_t e = 0; e < n_rows; ++e) {
      const float* row = m + rows[e] * stride + c;
      const Vec w = hn::Set(d, scale[e]);
      s0 = hn::MulAdd(w, hn::LoadU(d, row), s0);
      s1 = hn::MulAdd(w, hn::LoadU(d, row + lanes), s1);
      s2 = hn::MulAdd(w, hn::LoadU(d, row + 2 * lanes), s2);
      s3 = hn::MulAdd(w, hn::LoadU(d, row + 3 * lanes), s3);
      s4 = hn::MulAdd(w, hn::LoadU(d, row + 4 * lanes), s4);
      s5 = hn::MulAdd(w, hn::LoadU(d, row + 5 * lanes), s5);
      s6 = hn::MulAdd(w, hn::LoadU(d, row + 6 * lanes), s6);
      s7 = hn::MulAdd(w, hn::LoadU(d, row + 7 * lanes), s7);
    }
    hn::StoreU(s0, d, sum + c);
    hn::StoreU(s1, d, sum + c + lanes);
    hn::StoreU(s2, d, sum + c + 2 * lanes);
    hn::StoreU(s3, d, sum + c + 3 * lanes);
    hn::StoreU(s4, d, sum + c + 4 * lanes);
    hn::StoreU(s5, d, sum + c + 5 * lanes);
    hn::StoreU(s6, d, sum + c + 6 * lanes);
    hn::StoreU(s7, d, sum + c + 7 * lanes);
  }
  for (; c + lanes <= cols; c += lanes) {
    Vec s = start(c);
    for (std::int64_t e = 0; e < n_rows; ++e) {
      s = hn::MulAdd(hn::Set(d, scale[e]), hn::LoadU(d, m + rows[e] * stride + c), s);
    }
    hn::StoreU(s, d, sum + c);
  }
  for (; c < cols; ++c) {
    float s = accumulate ? sum[c] : 0.0F;
    for (std::int64_t e = 0; e < n_rows; ++e) s += scale[e] * m[rows[e] * stride + c];
    sum[c] = s;
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moesaic::kernels {

HWY_EXPORT(dots_impl);
HWY_EXPORT(sum_impl);

void gathered_dots(std::span<const float> a, ConstMatrix m, std::span<const std::int32_t> rows,
                   std::span<float> dots) {
  require<ShapeError>(static_cast<std::int64_t>(a.size()) == m.cols && rows.size() == dots.size(),
                      "gathered_dots: a [{}] by M [{}, {}], {} rows into {} products", a.size(),
                      m.rows, m.cols, rows.size(), dots.size());
  HWY_DYNAMIC_DISPATCH(dots_impl)
  (a.data(), m.cols, m.data, m.stride, rows.data(), static_cast<std::int64_t>(rows.size()),
   dots.data());
}

void gathered_sum(std::span<const float> scale, ConstMatrix m, std::span<const std::int32_t> rows,
                  std::span<float> sum, bool accumulate) {
  require<ShapeError>(
      static_cast<std::int64_t>(sum.size()) == m.cols && rows.size() == scale.size(),
      "gathered_sum: {} rows of M [{}, {}] by {} factors into [{}]", rows.size(), m.rows, m.cols,
      scale.size(), sum.size());
  HWY_DYNAMIC_DISPATCH(sum_impl)
  (scale.data(), m.data, m.stride, rows.data(), static_cast<std::int64_t>(rows.size()), m.cols,
   accumulate, sum.data());
}

}  // namespace moesaic::kernels
#endif  // HWY_ONCE
