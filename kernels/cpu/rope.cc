#include "kernels/rope.h"

#include <cmath>

#include "kernels/base/error.h"
#include "kernels/cpu/row_split.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rope.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace moesaic::kernels {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
using Tag = hn::ScalableTag<float>;

// cos and sin of position · freq[i]. The angle is the float32 product, as float32 implementations
// have it; cos and sin of that angle are computed in double and rounded once.
void rotations(float position, const float* freq, std::size_t n, float* cos, float* sin) {
  const hn::ScalableTag<double> dd;
  const hn::Rebind<float, decltype(dd)> df;
  const hn::Rebind<std::int32_t, decltype(dd)> di;
  const std::size_t lanes = hn::Lanes(dd);
  // π/2 in three parts; a multiple of the first two below 2^20 is exact.
  constexpr double kHalfPi1 = 0x1.921fb544p+0;
  constexpr double kHalfPi2 = 0x1.0b4611a6p-34;
  constexpr double kHalfPi3 = 0x1.3198a2e037073p-69;
  constexpr double kTwoOverPi = 0x1.45f306dc9c883p-1;
  const auto poly = [&](auto r2, auto... coefficients) {
    auto sum = hn::Zero(dd);
    ((sum = hn::MulAdd(sum, r2, hn::Set(dd, coefficients))), ...);
    return sum;
  };
  std::size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto angle = hn::PromoteTo(dd, hn::Mul(hn::Set(df, position), hn::LoadU(df, freq + i)));
    const auto quarter = hn::Round(hn::Mul(angle, hn::Set(dd, kTwoOverPi)));
    auto r = hn::NegMulAdd(quarter, hn::Set(dd, kHalfPi1), angle);
    r = hn::NegMulAdd(quarter, hn::Set(dd, kHalfPi2), r);
    r = hn::NegMulAdd(quarter, hn::Set(dd, kHalfPi3), r);
    // Taylor series on |r| <= π/4; the first term left out is below 1e-11.
    const auto r2 = hn::Mul(r, r);
    const auto s = hn::DemoteTo(df, hn::Mul(r, poly(r2, -1.0 / 39916800, 1.0 / 362880, -1.0 / 5040,
                                                    1.0 / 120, -1.0 / 6, 1.0)));
    const auto c = hn::DemoteTo(df, poly(r2, 1.0 / 479001600, -1.0 / 3628800, 1.0 / 40320,
                                         -1.0 / 720, 1.0 / 24, -0.5, 1.0));
    // Quarter turns: odd ones swap sine and cosine, then signs follow.
    const auto q = hn::DemoteTo(di, quarter);
    const auto one = hn::Set(di, 1);
    const auto swap = hn::RebindMask(df, hn::Eq(hn::And(q, one), one));
    const auto sin_sign = hn::BitCast(df, hn::ShiftLeft<30>(hn::And(q, hn::Set(di, 2))));
    const auto cos_sign =
        hn::BitCast(df, hn::ShiftLeft<30>(hn::And(hn::Add(q, one), hn::Set(di, 2))));
    hn::StoreU(hn::Xor(hn::IfThenElse(swap, c, s), sin_sign), df, sin + i);
    hn::StoreU(hn::Xor(hn::IfThenElse(swap, s, c), cos_sign), df, cos + i);
  }
  for (; i < n; ++i) {
    const double angle = position * freq[i];
    cos[i] = static_cast<float>(std::cos(angle));
    sin[i] = static_cast<float>(std::sin(angle));
  }
}

// Pairs (i, i + half).
void rotate_halves(float* head, std::size_t half, const float* cos, const float* sin) {
  const Tag d;
  const std::size_t lanes = hn::Lanes(d);
  std::size_t i = 0;
  for (; i + lanes <= half; i += lanes) {
    const auto a = hn::LoadU(d, head + i);
    const auto b = hn::LoadU(d, head + half + i);
    const auto c = hn::LoadU(d, cos + i);
    const auto s = hn::LoadU(d, sin + i);
    hn::StoreU(hn::Sub(hn::Mul(a, c), hn::Mul(b, s)), d, head + i);
    hn::StoreU(hn::Add(hn::Mul(a, s), hn::Mul(b, c)), d, head + half + i);
  }
  for (; i < half; ++i) {
    const float a = head[i];
    const float b = head[half + i];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = a * sin[i] + b * cos[i];
  }
}

// Pairs (2i, 2i + 1); cos and sin hold each value twice, the first sine of a pair negated.
void rotate_interleaved(float* head, std::size_t n, const float* cos, const float* sin) {
  const Tag d;
  const std::size_t lanes = hn::Lanes(d);
  std::size_t i = 0;
  for (; lanes >= 2 && i + lanes <= n; i += lanes) {
    const auto x = hn::LoadU(d, head + i);
    const auto turned = hn::Mul(hn::Reverse2(d, x), hn::LoadU(d, sin + i));
    hn::StoreU(hn::Add(hn::Mul(x, hn::LoadU(d, cos + i)), turned), d, head + i);
  }
  for (; i < n; i += 2) {
    const float a = head[i];
    const float b = head[i + 1];
    head[i] = a * cos[i] + b * sin[i];
    head[i + 1] = b * cos[i + 1] + a * sin[i + 1];
  }
}

// Rotates all heads of one row; scratch holds 3 · head_dim floats.
void rope_row(float* row, std::size_t n_heads, std::size_t head_dim, float position,
              const float* freq, bool interleaved, float* scratch) {
  const std::size_t half = head_dim / 2;
  float* cos = scratch;
  float* sin = scratch + half;
  rotations(position, freq, half, cos, sin);
  if (interleaved) {
    float* cos2 = scratch + head_dim;
    float* sin2 = cos2 + head_dim;
    for (std::size_t i = 0; i < half; ++i) {
      cos2[2 * i] = cos2[2 * i + 1] = cos[i];
      sin2[2 * i] = -sin[i];
      sin2[2 * i + 1] = sin[i];
    }
    for (std::size_t h = 0; h < n_heads; ++h) {
      rotate_interleaved(row + h * head_dim, head_dim, cos2, sin2);
    }
  } else {
    for (std::size_t h = 0; h < n_heads; ++h) rotate_halves(row + h * head_dim, half, cos, sin);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moesaic::kernels {

HWY_EXPORT(rope_row);

std::vector<float> rope_frequencies(int head_dim, double base) {
  std::vector<float> freq(static_cast<std::size_t>(head_dim / 2));
  for (std::size_t i = 0; i < freq.size(); ++i) {
    freq[i] = static_cast<float>(std::pow(base, -2.0 * static_cast<double>(i) / head_dim));
  }
  return freq;
}

void rope(Context& ctx, Matrix x, int head_dim, std::span<const std::int32_t> positions,
          std::span<const float> freq, RopeStyle style) {
  require<ShapeError>(head_dim > 0 && head_dim % 2 == 0,
                      "rope: head_dim is {}, expected a positive even number", head_dim);
  require<ShapeError>(x.cols % head_dim == 0,
                      "rope: rows hold {} elements, expected a multiple of head_dim {}", x.cols,
                      head_dim);
  require<ShapeError>(static_cast<std::int64_t>(positions.size()) == x.rows,
                      "rope: {} positions given, expected {}", positions.size(), x.rows);
  require<ShapeError>(freq.size() == static_cast<std::size_t>(head_dim / 2),
                      "rope: {} frequencies given, expected {}", freq.size(), head_dim / 2);
  const auto dim = static_cast<std::size_t>(head_dim);
  const std::size_t n_heads = static_cast<std::size_t>(x.cols) / dim;
  const Workspace::Scope scope(ctx.workspace);
  const std::size_t per_thread = (3 * dim + 15) / 16 * 16;
  const std::span<float> scratch =
      ctx.workspace.take<float>(per_thread * static_cast<std::size_t>(ctx.pool.n_threads()));
  const auto row = HWY_DYNAMIC_DISPATCH(rope_row);
  for_rows(ctx, x.rows, x.cols, [&](Range rows, int thread) {
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      row(x.row(t), n_heads, dim, static_cast<float>(positions[static_cast<std::size_t>(t)]),
          freq.data(), style == RopeStyle::Interleaved,
          scratch.data() + per_thread * static_cast<std::size_t>(thread));
    }
  });
}

}  // namespace moesaic::kernels
#endif  // HWY_ONCE
