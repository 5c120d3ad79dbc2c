#include "kernels/self_routed.h"

#include <algorithm>
#include <array>

#include "kernels/base/error.h"
#include "kernels/cpu/row_split.h"
#include "kernels/cpu/self_routed_sparse.h"
#include "kernels/cpu/target.h"
#include "kernels/panels.h"
#include "kernels/thresholds.h"

namespace moesaic::kernels {
namespace {

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

Matrix take(Context& ctx, std::int64_t rows, std::int64_t cols) {
  return {ctx.workspace.take<float>(size(rows * cols)).data(), rows, cols};
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

std::int64_t self_routed_dense(Context& ctx, const SelfRoutedView& layer, const LinearInput& input,
                               Matrix y, const Upcoming& next) {
  const std::int64_t n_tokens = y.rows, d_model = layer.d_model(), d_ff = layer.d_ff();
  const Workspace::Scope scope(ctx.workspace);
  const ConstMatrix x = normed(ctx, input);
  const Matrix large = take(ctx, n_tokens, d_model);
  const Matrix gate = take(ctx, n_tokens, d_ff), up = take(ctx, n_tokens, d_ff);
  const int n_threads = ctx.pool.n_threads();
  const std::int64_t n_marks = (std::max(d_model, d_ff) + 31) / 32;
  const auto all_marks = ctx.workspace.take<std::uint32_t>(size(n_threads * n_marks));
  const auto work = ctx.workspace.take<std::int64_t>(size(n_tokens));
  for_rows(ctx, n_tokens, d_model, [&](Range rows, int thread) {
    std::uint32_t* marks = all_marks.data() + thread * n_marks;
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      work[size(t)] =
          keep_large(x.row(t), layer.input_threshold.data(), size(d_model), large.row(t), marks);
    }
  });
  if (layer.up_by_input) {
    const std::array<LinearOutput, 2> outputs = {LinearOutput{layer.w_gate, gate},
                                                 LinearOutput{layer.w_up, up}};
    linear_group(ctx, {.x = large}, outputs, Traffic::Mlp);
  } else {
    linear(ctx, layer.w_gate, large, gate, Traffic::Mlp);
    linear(ctx, layer.w_up, x, up, Traffic::Mlp);
  }
  const float* gate_threshold = layer.up_by_input ? nullptr : layer.gate_threshold.data();
  for_rows(ctx, n_tokens, d_ff, [&](Range rows, int thread) {
    std::uint32_t* marks = all_marks.data() + thread * n_marks;
    for (std::int64_t t = rows.begin; t < rows.end; ++t) {
      const std::span<float> row(gate.row(t), size(d_ff));
      activation(layer.phi, row, row);
      const NeuronCounts n =
          keep_neurons(row.data(), up.row(t), gate_threshold, layer.hidden_threshold.data(),
                       size(d_ff), row.data(), marks);
      work[size(t)] = multiply_adds(layer, work[size(t)], n.routed, n.kept);
    }
  });
  read_ahead(ctx, next);
  linear(ctx, layer.w_down, gate, y, Traffic::Mlp);
  std::int64_t sum = 0;
  for (const std::int64_t w : work) sum += w;
  return sum;
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

SelfRoutedPath choose_self_routed_path(const Context& ctx, const SelfRoutedView& layer,
                                       std::int64_t n_tokens) {
  if (ctx.activations != Activations::Q16 || layer.gate_columns == nullptr) {
    return SelfRoutedPath::Dense;
  }
  std::int64_t dense = 0;
  for (const WeightView* w : {&layer.w_gate, &layer.w_up, &layer.w_down}) dense += panel_bytes(*w);
  const double sparse = static_cast<double>(n_tokens) * sparse_cost(layer);
  return sparse < static_cast<double>(dense) ? SelfRoutedPath::Sparse : SelfRoutedPath::Dense;
}

std::int64_t self_routed(Context& ctx, const SelfRoutedView& layer, const LinearInput& input,
                         Matrix y, const Upcoming& next, SelfRoutedPath path) {
  check_shapes(layer);
  require<ShapeError>(
      input.x.cols == layer.d_model() && y.cols == layer.d_model() && y.rows == input.x.rows,
      "self-routed layer: x [{}, {}] and y [{}, {}], expected [n, {}]", input.x.rows, input.x.cols,
      y.rows, y.cols, layer.d_model());
  if (y.rows == 0) return 0;
  obey_target_environment();
  const bool packed = ctx.activations == Activations::Q16 && layer.gate_columns != nullptr;
  if (path == SelfRoutedPath::Auto) path = choose_self_routed_path(ctx, layer, y.rows);
  if (path == SelfRoutedPath::Dense || !packed) {
    return self_routed_dense(ctx, layer, input, y, next);
  }
  read_ahead(ctx, next);
  return self_routed_sparse(ctx, layer, input, y);
}

}  // namespace moesaic::kernels
