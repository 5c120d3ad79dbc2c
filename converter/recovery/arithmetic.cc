#include "converter/recovery/arithmetic.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>
#include <numeric>
#include <vector>

#include "engine/logits.h"
#include "kernels/base/error.h"
#include "kernels/exponential.h"
#include "kernels/linear.h"
#include "kernels/top_k.h"

namespace moesaic::converter {
namespace {

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

}  // namespace

void multiply(Context&, bool trans_a, bool trans_b, MatrixView<const double> a,
              MatrixView<const double> b, bool accumulate, MatrixView<double> c) {
  multiply_here(trans_a, trans_b, 1, a, b, accumulate, c);
}

void multiply(Context& ctx, bool trans_a, bool trans_b, ConstMatrix a, ConstMatrix b,
              bool accumulate, Matrix c) {
  Context exact = ctx.with(Activations::F32);
  kernels::gemm(exact, trans_a, trans_b, 1, a, b, accumulate ? 1 : 0, c);
}

void multiply(Context& ctx, bool trans_a, bool trans_b, MatrixView<const std::uint16_t> a,
              MatrixView<const std::uint16_t> b, bool accumulate, Matrix c) {
  kernels::gemm(ctx, trans_a, trans_b, 1, a, b, accumulate ? 1 : 0, c);
}

// Plain loops: only checks against finite differences run in double, on small cases.
void multiply_here(bool trans_a, bool trans_b, double alpha, MatrixView<const double> a,
                   MatrixView<const double> b, bool accumulate, MatrixView<double> c) {
  const std::int64_t k = trans_a ? a.rows : a.cols;
  require<ShapeError>((trans_a ? a.cols : a.rows) == c.rows && (trans_b ? b.cols : b.rows) == k &&
                          (trans_b ? b.rows : b.cols) == c.cols,
                      "multiply: [{}, {}] by [{}, {}] into [{}, {}]", a.rows, a.cols, b.rows,
                      b.cols, c.rows, c.cols);
  for (std::int64_t i = 0; i < c.rows; ++i) {
    for (std::int64_t j = 0; j < c.cols; ++j) {
      double sum = 0;
      for (std::int64_t l = 0; l < k; ++l) {
        sum += (trans_a ? a.row(l)[i] : a.row(i)[l]) * (trans_b ? b.row(j)[l] : b.row(l)[j]);
      }
      c.row(i)[j] = alpha * sum + (accumulate ? c.row(i)[j] : 0);
    }
  }
}

void multiply_here(bool trans_a, bool trans_b, float alpha, ConstMatrix a, ConstMatrix b,
                   bool accumulate, Matrix c) {
  kernels::gemm_on_this_thread(trans_a, trans_b, alpha, a, b, accumulate ? 1 : 0, c);
}

void to_operand(const double* from, std::int64_t n, double* to) { std::copy_n(from, n, to); }
void to_operand(const float* from, std::int64_t n, float* to) { std::copy_n(from, n, to); }
void to_operand(const float* from, std::int64_t n, std::uint16_t* to) {
  kernels::to_bf16({from, size(n)}, {to, size(n)});
}
void from_operand(const double* from, std::int64_t n, double* to) { std::copy_n(from, n, to); }
void from_operand(const float* from, std::int64_t n, float* to) { std::copy_n(from, n, to); }
void from_operand(const std::uint16_t* from, std::int64_t n, float* to) {
  for (std::int64_t i = 0; i < n; ++i) {
    to[i] = std::bit_cast<float>(static_cast<std::uint32_t>(from[i]) << 16);
  }
}

void activation_slope(kernels::Activation phi, const double* x, std::int64_t n, double* value,
                      double* slope) {
  for (std::int64_t i = 0; i < n; ++i) {
    // φ(x) = x σ(z): z = x for SiLU, 2√(2/π)(x + 0.044715x³) for GELU.
    const double v = x[i];
    const bool silu = phi == kernels::Activation::Silu;
    const double root = 2 * std::sqrt(2 / std::numbers::pi);
    const double z = silu ? v : root * (v + 0.044715 * v * v * v);
    const double z_slope = silu ? 1 : root * (1 + 3 * 0.044715 * v * v);
    const double sigma = 1 / (1 + std::exp(-z));
    value[i] = v * sigma;
    slope[i] = sigma + v * z_slope * sigma * (1 - sigma);
  }
}

void activation_slope(kernels::Activation phi, const float* x, std::int64_t n, float* value,
                      float* slope) {
  kernels::activation_slope(phi, {x, size(n)}, {value, size(n)}, {slope, size(n)});
}

std::int64_t keep_large(const double* x, const double* threshold, std::int64_t n, double* kept,
                        std::uint32_t* marks) {
  std::fill_n(marks, (n + 31) / 32, 0U);
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const bool large = std::abs(x[i]) >= threshold[i];
    kept[i] = large ? x[i] : 0;
    marks[i / 32] |= std::uint32_t{large} << (i % 32);
    count += large;
  }
  return count;
}

std::int64_t keep_large(const float* x, const float* threshold, std::int64_t n, float* kept,
                        std::uint32_t* marks) {
  return kernels::keep_large(x, threshold, size(n), kept, marks);
}

kernels::NeuronCounts keep_slopes(const double* gate, const double* hidden, std::int64_t n,
                                  double* a, double* u, double* slope) {
  kernels::NeuronCounts counts;
  for (std::int64_t i = 0; i < n; ++i) {
    const double product = a[i] * u[i];
    const bool routed = gate == nullptr || std::abs(a[i]) >= gate[i];
    const bool kept = routed && std::abs(product) >= hidden[i];
    slope[i] = kept ? slope[i] * u[i] : 0;
    a[i] = kept ? a[i] : 0;
    u[i] = kept ? product : 0;
    counts.routed += routed;
    counts.kept += kept;
  }
  return counts;
}

kernels::NeuronCounts keep_slopes(const float* gate, const float* hidden, std::int64_t n, float* a,
                                  float* u, float* slope) {
  return kernels::keep_slopes(gate, hidden, size(n), a, u, slope);
}

double exponentials(const double* x, std::int64_t n, double shift, double* y) {
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += y[i] = std::exp(x[i] - shift);
  return sum;
}

float exponentials(const float* x, std::int64_t n, float shift, float* y) {
  return kernels::exponentials({x, size(n)}, shift, {y, size(n)});
}

double largest(const double* x, std::int64_t n) { return *std::max_element(x, x + n); }
float largest(const float* x, std::int64_t n) { return engine::max_logit({x, size(n)}); }

void choose_top(const double* scores, std::int64_t n, std::int64_t k, std::int32_t* ids) {
  std::vector<std::int32_t> order(size(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int32_t a, std::int32_t b) { return scores[a] > scores[b]; });
  std::copy_n(order.begin(), k, ids);
  std::sort(ids, ids + k);
}

void choose_top(const float* scores, std::int64_t n, std::int64_t k, std::int32_t* ids) {
  thread_local std::vector<std::uint32_t> keys;
  keys.resize(std::max(keys.size(), size(n)));
  kernels::top_k({scores, size(n)}, {ids, size(k)}, {keys.data(), size(n)});
}

}  // namespace moesaic::converter
