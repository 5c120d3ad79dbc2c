#include "kernels/rms_norm.h"

#include <cmath>

#include "kernels/base/error.h"
#include "kernels/cpu/row_split.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rms_norm.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace moesaic::kernels {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using Tag = hn::ScalableTag<float>;

float sum_of_squares(const float* x, std::size_t n) {
  const Tag d;
  const std::size_t lanes = hn::Lanes(d);
  auto a = hn::Zero(d), b = a;
  std::size_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    const auto x0 = hn::LoadU(d, x + i);
    const auto x1 = hn::LoadU(d, x + i + lanes);
    a = hn::MulAdd(x0, x0, a);
    b = hn::MulAdd(x1, x1, b);
  }
  for (; i + lanes <= n; i += lanes) {
    const auto x0 = hn::LoadU(d, x + i);
    a = hn::MulAdd(x0, x0, a);
  }
  float sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(a, b)));
  for (; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

void rms_norm_row(const float* x, const float* weight, std::size_t n, float eps, float* y) {
  const Tag d;
  const std::size_t lanes = hn::Lanes(d);
  const float mean = sum_of_squares(x, n) / static_cast<float>(n);
  const float scale = 1.0f / std::sqrt(mean + eps);
  const auto vscale = hn::Set(d, scale);
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto normed = hn::Mul(hn::LoadU(d, x + i), vscale);
    hn::StoreU(hn::Mul(normed, hn::LoadU(d, weight + i)), d, y + i);
  }
  for (; i < n; ++i) y[i] = x[i] * scale * weight[i];
}

void add_row(const float* y, std::size_t n, float* x) {
  const Tag d;
  const std::size_t lanes = hn::Lanes(d);
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(hn::Add(hn::LoadU(d, x + i), hn::LoadU(d, y + i)), d, x + i);
  }
  for (; i < n; ++i) x[i] += y[i];
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moesaic::kernels {

HWY_EXPORT(rms_norm_row);
HWY_EXPORT(add_row);

void rms_norm(Context& ctx, ConstMatrix x, std::span<const float> weight, float eps, Matrix y) {
  require<ShapeError>(x.rows == y.rows && x.cols == y.cols,
                      "rms_norm: output is [{}, {}], expected [{}, {}]", y.rows, y.cols, x.rows,
                      x.cols);
  require<ShapeError>(static_cast<std::int64_t>(weight.size()) == x.cols,
                      "rms_norm: weight holds {} elements, expected {}", weight.size(), x.cols);
  const auto row = HWY_DYNAMIC_DISPATCH(rms_norm_row);
  for_rows(ctx, x.rows, x.cols, [&](Range rows, int) {
    for (std::int64_t r = rows.begin; r < rows.end; ++r) {
      row(x.row(r), weight.data(), weight.size(), eps, y.row(r));
    }
  });
}

void add(Context& ctx, ConstMatrix y, Matrix x) {
  require<ShapeError>(x.rows == y.rows && x.cols == y.cols,
                      "add: operands are [{}, {}] and [{}, {}], expected the same shape", x.rows,
                      x.cols, y.rows, y.cols);
  const auto row = HWY_DYNAMIC_DISPATCH(add_row);
  for_rows(ctx, x.rows, x.cols, [&](Range rows, int) {
    for (std::int64_t r = rows.begin; r < rows.end; ++r) {
      row(y.row(r), static_cast<std::size_t>(y.cols), x.row(r));
    }
  });
}

}  // namespace moesaic::kernels
#endif  // HWY_ONCE
