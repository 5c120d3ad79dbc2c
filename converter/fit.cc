#include "converter/fit.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "converter/linalg.h"
#include "converter/rounding.h"
#include "converter/rows.h"
#include "converter/tiles.h"
#include "kernels/base/error.h"
#include "kernels/linear.h"

namespace moesaic::converter {
namespace {

// Columns of the Gram matrix per product: four products of five eighths of the work.
constexpr std::int64_t kGramBlock = 544;

// φ of fit_outputs for a tile: activations in place, experts' part centred and masked.
void masked_features(Context& ctx, const Student& s, ConstMatrix x, Matrix phi) {
  const Workspace::Scope scope(ctx.workspace);
  const std::int64_t n_shared = s.plan.n_shared;
  Matrix mask = take(ctx, x.rows, s.n_experts());
  neuron_activations(ctx, s.neurons, x, phi, take(ctx, x.rows, s.neurons.n));
  select(ctx, s, x, mask, mask);
  for_each_row(ctx, x.rows, [&](std::int64_t t, int) {
    float* row = phi.row(t) + n_shared;
    const float* m = mask.row(t);
    const float* mean = s.mean.data() + n_shared;
    for (std::int64_t e = 0; e < s.n_experts(); ++e) {
      for (std::int64_t j = 0; j < s.plan.block; ++j, ++row, ++mean) *row = m[e] * (*row - *mean);
    }
  });
}

}  // namespace

LayerSample LayerSample::held_out() const {
  LayerSample out;
  out.x = x.slice(n_fit, x.rows - n_fit);
  out.y = y.slice(n_fit, y.rows - n_fit);
  out.weight = weight.subspan(static_cast<std::size_t>(n_fit));
  return out;
}

DMatrix input_factor(Context& ctx, const LayerSample& s) {
  const std::int64_t d = s.x.cols;
  AlignedBuffer<float> xx(static_cast<std::size_t>(d * d));
  for_tiles(ctx, std::min(kRouterRows, s.n_fit), [&](std::int64_t first, std::int64_t rows) {
    Matrix xw = take(ctx, rows, d);
    for_each_row(ctx, rows, [&](std::int64_t t, int) {
      const float root = std::sqrt(s.weight[static_cast<std::size_t>(first + t)]);
      for (std::int64_t i = 0; i < d; ++i) xw.row(t)[i] = root * s.x.row(first + t)[i];
    });
    kernels::gemm(ctx, true, false, 1, xw, xw, 1, {xx.data(), d, d});
  });
  DMatrix moments = to_double({xx.data(), d, d});
  double trace = 0;
  for (std::int64_t i = 0; i < d; ++i) trace += moments.at(i, i);
  for (std::int64_t i = 0; i < d; ++i)
    moments.at(i, i) += 0.01 * trace / static_cast<double>(d) + 1e-30;
  return cholesky(std::move(moments));
}

void fit_outputs(Context& ctx, Student& student, const LayerSample& s, double bypass_ridge,
                 double ridge, DType down_dtype) {
  const std::int64_t d = student.neurons.d_model;
  const std::int64_t n = student.neurons.n;
  const std::int64_t a = n + 1;  // features eliminated first: φ and the constant
  const std::int64_t f = a + d;  // all features: φ, 1, x
  AlignedBuffer<float> gram(static_cast<std::size_t>(f * f));
  AlignedBuffer<float> cross(static_cast<std::size_t>(f * d));
  for_tiles(ctx, s.n_fit, [&](std::int64_t first, std::int64_t rows) {
    Matrix features = take(ctx, rows, f);
    Matrix target = take(ctx, rows, d);
    const ConstMatrix x = s.x.slice(first, rows);
    masked_features(ctx, student, x, {features.data, rows, n, f});
    // What is left of y after the start's own down rows: the fit then looks for their change.
    kernels::gemm(ctx, false, false, -1, {features.data, rows, n, f}, student.neurons.down(), 0,
                  target);
    for_each_row(ctx, rows, [&](std::int64_t t, int) {
      const float root = std::sqrt(s.weight[static_cast<std::size_t>(first + t)]);
      float* row = features.row(t);
      row[n] = 1;
      std::copy_n(x.row(t), d, row + a);
      for (std::int64_t i = 0; i < f; ++i) row[i] *= root;
      for (std::int64_t j = 0; j < d; ++j)
        target.row(t)[j] = root * (target.row(t)[j] + s.y.row(first + t)[j]);
    });
    // The Gram matrix is symmetric: only blocks on and above the diagonal are computed.
    for (std::int64_t begin = 0; begin < f; begin += kGramBlock) {
      const std::int64_t width = std::min(kGramBlock, f - begin);
      kernels::gemm(ctx, true, false, 1, {features.data + begin, rows, width, f},
                    {features.data + begin, rows, f - begin, f}, 1,
                    {gram.data() + begin * f + begin, width, f - begin, f});
    }
    kernels::gemm(ctx, true, false, 1, features, target, 1, {cross.data(), f, d});
  });
  for (std::int64_t i = 0; i < f; ++i) {
    for (std::int64_t j = 0; j < i; ++j)
      gram[static_cast<std::size_t>(i * f + j)] = gram[static_cast<std::size_t>(j * f + i)];
  }
  const DMatrix g = to_double({gram.data(), f, f});
  const DMatrix c = to_double({cross.data(), f, d});
  DMatrix g_aa = g.block(0, 0, a, a);
  const DMatrix g_ab = g.block(0, a, a, d);
  DMatrix g_bb = g.block(a, a, d, d);
  const DMatrix c_a = c.block(0, 0, a, d);
  DMatrix c_b = c.block(a, 0, d, d);
  double trace = 0;
  for (std::int64_t i = 0; i < n; ++i) trace += g_aa.at(i, i);
  // Each neuron is held to its start in proportion to its own energy, and a little to the mean
  // energy, so that a neuron that is never selected keeps its row.
  for (std::int64_t i = 0; i < n; ++i) {
    g_aa.at(i, i) +=
        ridge * (g_aa.at(i, i) + trace / static_cast<double>(n)) + 1e-12 * trace + 1e-30;
  }
  g_aa.at(n, n) += 1e-30;
  const DMatrix l = cholesky(std::move(g_aa));
  // With M = L⁻¹ [G_ab, C_a], elimination of φ and 1 leaves S = G_bb − M_xᵀM_x and C_b − M_xᵀM_y.
  DMatrix m_x = g_ab;
  solve_triangular(l, false, m_x);
  DMatrix m_y = c_a;
  solve_triangular(l, false, m_y);
  const std::int64_t q = student.plan.bypass_rank;
  DMatrix rest = c_a;  // right-hand side for φ once the bypass is known
  if (q > 0) {
    // What φ explains is taken off sums that float32 has rounded: a floor keeps the rest positive.
    double energy = 0;
    for (std::int64_t i = 0; i < d; ++i) energy += g_bb.at(i, i) / static_cast<double>(d);
    for (std::int64_t i = 0; i < d; ++i) g_bb.at(i, i) += 1e-5 * energy;
    const DMatrix s_xx = multiply(m_x, true, m_x, false);
    const DMatrix s_xy = multiply(m_x, true, m_y, false);
    for (std::size_t i = 0; i < g_bb.data.size(); ++i) g_bb.data[i] -= s_xx.data[i];
    for (std::size_t i = 0; i < c_b.data.size(); ++i) c_b.data[i] -= s_xy.data[i];
    for (std::int64_t i = 0; i < d;
         ++i) {  // symmetric to the last bit, as Cholesky and the next step want it
      for (std::int64_t j = 0; j < i; ++j) g_bb.at(i, j) = g_bb.at(j, i);
    }
    const LowRank bypass =
        reduced_rank_regression(std::move(g_bb), std::move(c_b), q, bypass_ridge);
    student.bypass_q = to_float(bypass.v);
    student.bypass_p = to_float(bypass.u);
    const DMatrix taken = multiply(multiply(g_ab, false, bypass.v, true), false, bypass.u, true);
    for (std::size_t i = 0; i < rest.data.size(); ++i) rest.data[i] -= taken.data[i];
  }
  solve_cholesky(l, rest);
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < d; ++j) {
      student.neurons.w_down[static_cast<std::size_t>(i * d + j)] +=
          static_cast<float>(rest.at(i, j));
    }
  }
  for (std::int64_t j = 0; j < d; ++j)
    student.bias[static_cast<std::size_t>(j)] = static_cast<float>(rest.at(n, j));
  // Rounds, then moves the mean of what that loses into the bias: G_nk is Σ ω φ_k, G_nn is Σ ω.
  const std::vector<float> exact(student.neurons.w_down.begin(), student.neurons.w_down.end());
  round_outputs(ctx, {student.neurons.w_down.data(), n, d}, l, down_dtype);
  for (std::int64_t j = 0; j < d; ++j) {
    double lost = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      const auto at = static_cast<std::size_t>(i * d + j);
      lost += g.at(n, i) * (static_cast<double>(exact[at]) - student.neurons.w_down[at]);
    }
    student.bias[static_cast<std::size_t>(j)] += static_cast<float>(lost / g.at(n, n));
  }
}

void student_forward(Context& ctx, const Student& s, ConstMatrix x, Matrix y) {
  const std::int64_t d = s.neurons.d_model;
  const std::int64_t q = s.plan.bypass_rank;
  for_tiles(ctx, x.rows, [&](std::int64_t first, std::int64_t rows) {
    Matrix phi = take(ctx, rows, s.neurons.n);
    const ConstMatrix xs = x.slice(first, rows);
    Matrix ys = y.slice(first, rows);
    masked_features(ctx, s, xs, phi);
    for (std::int64_t t = 0; t < rows; ++t) std::copy_n(s.bias.data(), d, ys.row(t));
    kernels::gemm(ctx, false, false, 1, phi, s.neurons.down(), 1, ys);
    if (q > 0) {
      Matrix qx = take(ctx, rows, q);
      kernels::gemm(ctx, false, true, 1, xs, {s.bypass_q.data(), q, d}, 0, qx);
      kernels::gemm(ctx, false, true, 1, qx, {s.bypass_p.data(), d, q}, 1, ys);
    }
  });
}

double relative_error(const LayerSample& s, ConstMatrix y_hat) {
  const std::int64_t d = s.y.cols;
  std::vector<double> sum(static_cast<std::size_t>(d));
  std::vector<double> square(static_cast<std::size_t>(d));
  double total = 0;
  double error = 0;
  for (std::int64_t t = 0; t < s.y.rows; ++t) {
    const double w = s.weight[static_cast<std::size_t>(t)];
    total += w;
    for (std::int64_t j = 0; j < d; ++j) {
      const double v = s.y.row(t)[j];
      const double e = v - y_hat.row(t)[j];
      sum[static_cast<std::size_t>(j)] += w * v;
      square[static_cast<std::size_t>(j)] += w * v * v;
      error += w * e * e;
    }
  }
  double variance = 0;
  for (std::size_t j = 0; j < sum.size(); ++j) variance += square[j] - sum[j] * sum[j] / total;
  if (error == 0) return 0;
  return variance > 0 ? error / variance : std::numeric_limits<double>::quiet_NaN();
}

}  // namespace moesaic::converter
