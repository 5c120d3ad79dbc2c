#include "kernels/self_routed.h"

#include <cmath>

#include "kernels/base/error.h"

namespace moesaic::kernels {
namespace {

Matrix take(Context& ctx, std::int64_t rows, std::int64_t cols) {
  return {ctx.workspace.take<float>(static_cast<std::size_t>(rows * cols)).data(), rows, cols};
}

// x̂ of one row; how many entries are left.
std::int64_t keep_large(const float* x, std::span<const float> threshold, float* kept) {
  std::int64_t n = 0;
  for (std::size_t j = 0; j < threshold.size(); ++j) {
    const bool large = std::fabs(x[j]) >= threshold[j];
    kept[j] = large ? x[j] : 0.0f;
    n += large;
  }
  return n;
}

// h = a ⊙ u where it is kept, else 0; a, the activated gate, may be h.
struct Kept {
  std::int64_t routed = 0, kept = 0;
};
Kept keep_neurons(const SelfRoutedView& layer, const float* a, const float* u, float* h) {
  Kept n;
  const float* gate = layer.up_by_input ? nullptr : layer.gate_threshold.data();
  for (std::size_t i = 0; i < layer.hidden_threshold.size(); ++i) {
    const bool routed = gate == nullptr || std::fabs(a[i]) >= gate[i];
    const float product = a[i] * u[i];
    const bool kept = routed && std::fabs(product) >= layer.hidden_threshold[i];
    h[i] = kept ? product : 0.0f;
    n.routed += routed;
    n.kept += kept;
  }
  return n;
}

void expect_shape(std::string_view part, const WeightView& w, std::int64_t rows,
                  std::int64_t cols) {
  require<ShapeError>(w.rows == rows && w.cols == cols,
                      "self-routed layer: {} is [{}, {}], expected [{}, {}]", part, w.rows, w.cols,
                      rows, cols);
}

void expect_size(std::string_view part, std::span<const float> v, std::int64_t n) {
  require<ShapeError>(static_cast<std::int64_t>(v.size()) == n,
                      "self-routed layer: {} has {} entries, expected {}", part, v.size(), n);
}

}  // namespace

void check_shapes(const SelfRoutedView& layer) {
  const std::int64_t d_model = layer.d_model(), d_ff = layer.d_ff();
  expect_shape("w_up", layer.w_up, d_ff, d_model);
  expect_shape("w_down", layer.w_down, d_model, d_ff);
  expect_size("input_threshold", layer.input_threshold, d_model);
  expect_size("gate_threshold", layer.gate_threshold, layer.up_by_input ? 0 : d_ff);
  expect_size("hidden_threshold", layer.hidden_threshold, d_ff);
}

std::int64_t multiply_adds(const SelfRoutedView& layer, std::int64_t n_inputs,
                           std::int64_t n_routed, std::int64_t n_kept) {
  const std::int64_t up = layer.up_by_input ? n_inputs * layer.d_ff() : n_routed * layer.d_model();
  return n_inputs * layer.d_ff() + up + n_kept * layer.d_model();
}

std::int64_t self_routed(Context& ctx, const SelfRoutedView& layer, const LinearInput& input,
                         Matrix y, const Upcoming& next) {
  check_shapes(layer);
  require<ShapeError>(
      input.x.cols == layer.d_model() && y.cols == layer.d_model() && y.rows == input.x.rows,
      "self-routed layer: x [{}, {}] and y [{}, {}], expected [n, {}]", input.x.rows, input.x.cols,
      y.rows, y.cols, layer.d_model());
  const std::int64_t n_tokens = y.rows, d_ff = layer.d_ff();
  if (n_tokens == 0) return 0;
  const Workspace::Scope scope(ctx.workspace);
  const ConstMatrix x = normed(ctx, input);
  const Matrix large = take(ctx, n_tokens, layer.d_model());
  const Matrix gate = take(ctx, n_tokens, d_ff), up = take(ctx, n_tokens, d_ff);
  const std::span<std::int64_t> work =
      ctx.workspace.take<std::int64_t>(static_cast<std::size_t>(n_tokens));
  const int n_threads = ctx.pool.n_threads();
  ctx.pool.run([&](int thread) {
    const Range rows = split(n_tokens, n_threads, thread);
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      work[static_cast<std::size_t>(t)] = keep_large(x.row(t), layer.input_threshold, large.row(t));
    }
  });
  linear(ctx, layer.w_gate, large, gate, Traffic::Mlp);
  linear(ctx, layer.w_up, layer.up_by_input ? ConstMatrix(large) : x, up, Traffic::Mlp);
  const Matrix ones = take(ctx, n_threads, d_ff);
  std::fill_n(ones.data, ones.rows * ones.cols, 1.0f);
  ctx.pool.run([&](int thread) {
    const Range rows = split(n_tokens, n_threads, thread);
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      const Matrix row(gate.row(t), 1, d_ff);
      // One row at a time runs on the calling thread.
      gated_activation(ctx, layer.phi, row, ConstMatrix(ones.row(thread), 1, d_ff), row);
      const Kept n = keep_neurons(layer, gate.row(t), up.row(t), gate.row(t));
      std::int64_t& of_token = work[static_cast<std::size_t>(t)];
      of_token = multiply_adds(layer, of_token, n.routed, n.kept);
    }
  });
  read_ahead(ctx, next);
  linear(ctx, layer.w_down, gate, y, Traffic::Mlp);
  std::int64_t sum = 0;
  for (const std::int64_t w : work) sum += w;
  return sum;
}

}  // namespace moesaic::kernels
