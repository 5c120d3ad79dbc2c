#include "converter/recovery/router_refit.h"

#include <algorithm>

#include "converter/linalg.h"
#include "converter/recovery/moments.h"
#include "kernels/linear.h"

namespace moesaic::converter {

RouterMoments::RouterMoments(const MoeShape& shape)
    : shape_(shape),
      xx_(static_cast<std::size_t>((shape.d_model + 1) * (shape.d_model + 1))),
      xc_(static_cast<std::size_t>((shape.d_model + 1) * shape.n_experts)) {}

void RouterMoments::add(Context& ctx, double decay, MatrixView<const std::uint16_t> x,
                        MatrixView<const std::uint16_t> c, std::span<const float> weight) {
  const Workspace::Scope scope(ctx.workspace);
  const std::int64_t d = shape_.d_model + 1;
  const std::int64_t n_experts = shape_.n_experts;
  const auto fade = static_cast<float>(decay);
  const auto a = take_weighted(ctx, x, weight, true);
  const auto b = take_weighted(ctx, c, weight, false);
  kernels::gemm(ctx, true, false, 1, a, a, fade, {xx_.data(), d, d});
  kernels::gemm(ctx, true, false, 1, a, b, fade, {xc_.data(), d, n_experts});
}

void RouterMoments::refit(double ridge, MoeParameters<float>& parameters) const {
  const std::int64_t d = shape_.d_model;
  const std::int64_t n = shape_.n_experts;
  const auto xx_at = [&](std::int64_t i, std::int64_t j) {
    return static_cast<double>(xx_[static_cast<std::size_t>(i * (d + 1) + j)]);
  };
  const auto xc_at = [&](std::int64_t i, std::int64_t j) {
    return static_cast<double>(xc_[static_cast<std::size_t>(i * n + j)]);
  };
  const double total = xx_at(d, d);
  if (total <= 0) return;  // nothing was seen
  DMatrix xx(d, d);
  DMatrix xc(d, n);
  for (std::int64_t i = 0; i < d; ++i) {
    for (std::int64_t j = 0; j < d; ++j) {
      xx.at(i, j) = (xx_at(i, j) - xx_at(i, d) * xx_at(d, j) / total) / total;
    }
    for (std::int64_t j = 0; j < n; ++j) {
      xc.at(i, j) = (xc_at(i, j) - xx_at(i, d) * xc_at(d, j) / total) / total;
    }
  }
  const LowRank fit =
      reduced_rank_regression(std::move(xx), std::move(xc), shape_.router_rank, ridge);
  std::vector<double> centre(static_cast<std::size_t>(shape_.router_rank));  // V x̄
  for (std::int64_t r = 0; r < shape_.router_rank; ++r) {
    for (std::int64_t i = 0; i < d; ++i) {
      centre[static_cast<std::size_t>(r)] += fit.v.at(r, i) * xx_at(d, i) / total;
    }
  }
  std::copy(fit.v.data.begin(), fit.v.data.end(), parameters.router_v.begin());
  std::copy(fit.u.data.begin(), fit.u.data.end(), parameters.router_u.begin());
  for (std::int64_t e = 0; e < n; ++e) {
    double intercept = xc_at(d, e) / total;
    for (std::int64_t r = 0; r < shape_.router_rank; ++r) {
      intercept -= fit.u.at(e, r) * centre[static_cast<std::size_t>(r)];
    }
    parameters.router_bias[static_cast<std::size_t>(e)] = static_cast<float>(intercept);
  }
}

}  // namespace moesaic::converter
