#include "converter/recovery/self_routed.h"

#include <algorithm>
#include <cmath>

#include "kernels/base/error.h"

namespace moesaic::converter {
namespace {

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

}  // namespace

template <class T>
SelfRoutedParameters<T>::SelfRoutedParameters(const SelfRoutedShape& s)
    : w_gate(size(s.d_ff * s.d_model)), w_up(w_gate.size()), w_down(w_gate.size()) {}

template <class T>
std::vector<std::span<T>> SelfRoutedParameters<T>::tensors() {
  return {w_gate.span(), w_up.span(), w_down.span()};
}

void SelfRoutedCounts::add(const SelfRoutedCounts& other) {
  tokens += other.tokens;
  inputs += other.inputs;
  routed += other.routed;
  kept += other.kept;
}

SelfRoutedTriple SelfRoutedCounts::shares(const SelfRoutedShape& shape) const {
  if (tokens == 0) return {};
  const auto share = [&](std::int64_t n, std::int64_t of) {
    return static_cast<float>(static_cast<double>(n) / static_cast<double>(tokens * of));
  };
  return {share(inputs, shape.d_model), share(routed, shape.d_ff), share(kept, shape.d_ff)};
}

double SelfRoutedCounts::multiply_adds(const SelfRoutedShape& shape) const {
  // Linear in the counts: their sum's are the sum of the tokens'.
  kernels::SelfRoutedView view;
  view.up_by_input = shape.up_by_input;
  view.w_gate.rows = shape.d_ff;
  view.w_gate.cols = shape.d_model;
  return static_cast<double>(kernels::multiply_adds(view, inputs, routed, kept)) /
         static_cast<double>(tokens);
}

template <class P>
SelfRoutedLayer<P>::SelfRoutedLayer(const SelfRoutedShape& shape,
                                    SelfRoutedParameters<Scalar>& parameters,
                                    SelfRoutedThresholds<Scalar> thresholds)
    : shape_(shape), parameters_(parameters) {
  set_thresholds(std::move(thresholds));
}

template <class P>
void SelfRoutedLayer<P>::set_thresholds(SelfRoutedThresholds<Scalar> thresholds) {
  const auto expect = [](const std::vector<Scalar>& v, std::int64_t n) {
    require<ShapeError>(v.size() == size(n), "self-routed layer: {} thresholds, expected {}",
                        v.size(), n);
  };
  expect(thresholds.input, shape_.d_model);
  expect(thresholds.gate, shape_.up_by_input ? 0 : shape_.d_ff);
  expect(thresholds.hidden, shape_.d_ff);
  thresholds_ = given_ = std::move(thresholds);
  factors_ = {1, 1, 1};
}

template <class P>
void SelfRoutedLayer<P>::refresh(Context& ctx) {
  const auto take = [&](const AlignedBuffer<Scalar>& from, std::int64_t rows, std::int64_t cols,
                        Storage<Operand>& to) {
    to_operand(ctx, matrix(from, rows, cols), to.reshape(rows, cols));
  };
  take(parameters_.w_gate, shape_.d_ff, shape_.d_model, w_gate_);
  take(parameters_.w_up, shape_.d_ff, shape_.d_model, w_up_);
  take(parameters_.w_down, shape_.d_model, shape_.d_ff, w_down_);
  const auto scale = [&](const std::vector<Scalar>& from, SelfRoutedVector which,
                         std::vector<Scalar>& to) {
    for (std::size_t i = 0; i < from.size(); ++i) {
      to[i] = from[i] * static_cast<Scalar>(factors_[which]);
    }
  };
  scale(given_.input, kInput, thresholds_.input);
  scale(given_.gate, kGate, thresholds_.gate);
  scale(given_.hidden, kHidden, thresholds_.hidden);
}

template <class P>
void SelfRoutedLayer<P>::forward(Context& ctx, MatrixView<const Scalar> x, SelfRoutedTape<P>& tape,
                                 MatrixView<Scalar> y) const {
  const Workspace::Scope scope(ctx.workspace);
  const std::int64_t m = x.rows;
  const std::int64_t d = shape_.d_model;
  const std::int64_t n = shape_.d_ff;
  const MatrixView<Operand> all = tape.x.reshape(m, d);
  const MatrixView<Operand> large = tape.large.reshape(m, d);
  const MatrixView<std::uint32_t> marks = tape.large_marks.reshape(m, (d + 31) / 32);
  const auto row = take_matrix<Scalar>(ctx, ctx.pool.n_threads(), std::max(d, n));
  std::vector<SelfRoutedCounts> counts(size(ctx.pool.n_threads()));
  for_each_row(ctx, m, [&](std::int64_t t, int thread) {
    counts[size(thread)].inputs +=
        keep_large(x.row(t), thresholds_.input.data(), d, row.row(thread), marks.row(t));
    to_operand(x.row(t), d, all.row(t));
    to_operand(row.row(thread), d, large.row(t));
  });
  const auto gate = take_matrix<Scalar>(ctx, m, n);
  const auto up = take_matrix<Scalar>(ctx, m, n);
  multiply(ctx, false, true, constant(large), constant(w_gate_.view()), false, gate);
  multiply(ctx, false, true, constant(shape_.up_by_input ? large : all), constant(w_up_.view()),
           false, up);
  const MatrixView<Operand> h = tape.h.reshape(m, n);
  const MatrixView<Operand> slope_gate = tape.slope_gate.reshape(m, n);
  const MatrixView<Operand> slope_up = tape.slope_up.reshape(m, n);
  for_each_row(ctx, m, [&](std::int64_t t, int thread) {
    Scalar* slope = row.row(thread);
    activation_slope(shape_.phi, gate.row(t), n, gate.row(t), slope);
    // gate becomes h's slope in the up product, up becomes h, slope h's slope in the gate product.
    const kernels::NeuronCounts kept =
        keep_slopes(shape_.up_by_input ? nullptr : thresholds_.gate.data(),
                    thresholds_.hidden.data(), n, gate.row(t), up.row(t), slope);
    counts[size(thread)].add({.tokens = 1, .inputs = 0, .routed = kept.routed, .kept = kept.kept});
    to_operand(slope, n, slope_gate.row(t));
    to_operand(gate.row(t), n, slope_up.row(t));
    to_operand(up.row(t), n, h.row(t));
  });
  tape.counts = {};
  for (const SelfRoutedCounts& c : counts) tape.counts.add(c);
  multiply(ctx, false, true, constant(h), constant(w_down_.view()), false, y);
}

template <class P>
void SelfRoutedLayer<P>::backward(Context& ctx, bool straight_through, MatrixView<const Scalar> dy,
                                  SelfRoutedTape<P>& tape, SelfRoutedParameters<Scalar>& gradient,
                                  MatrixView<Scalar> dx) const {
  const Workspace::Scope scope(ctx.workspace);
  const std::int64_t m = dy.rows;
  const std::int64_t d = shape_.d_model;
  const std::int64_t n = shape_.d_ff;
  const auto dyo = take_matrix<Operand>(ctx, m, d);
  to_operand(ctx, dy, dyo);
  multiply(ctx, true, false, constant(dyo), constant(tape.h.view()), true,
           matrix(gradient.w_down, d, n));
  const auto dh = take_matrix<Scalar>(ctx, m, n);
  multiply(ctx, false, false, constant(dyo), constant(w_down_.view()), false, dh);

  // The slopes become the gradients of the gate and up products; the masks stand in them.
  const MatrixView<Operand> dg = tape.slope_gate.view();
  const MatrixView<Operand> du = tape.slope_up.view();
  const auto row = take_matrix<Scalar>(ctx, ctx.pool.n_threads(), n);
  for_each_row(ctx, m, [&](std::int64_t t, int thread) {
    const Scalar* own = dh.row(t);
    Scalar* product = row.row(thread);
    for (Operand* slope : {dg.row(t), du.row(t)}) {
      from_operand(slope, n, product);
      for (std::int64_t i = 0; i < n; ++i) product[i] *= own[i];
      to_operand(product, n, slope);
    }
  });
  const MatrixView<const Operand> large = tape.large.view();
  const MatrixView<const Operand> up_input = shape_.up_by_input ? large : tape.x.view();
  multiply(ctx, true, false, constant(dg), large, true, matrix(gradient.w_gate, n, d));
  multiply(ctx, true, false, constant(du), up_input, true, matrix(gradient.w_up, n, d));
  if (dx.data == nullptr) return;
  multiply(ctx, false, false, constant(dg), constant(w_gate_.view()), false, dx);
  const auto add_up = [&] {
    multiply(ctx, false, false, constant(du), constant(w_up_.view()), true, dx);
  };
  if (shape_.up_by_input) add_up();
  if (!straight_through) {
    for_each_row(ctx, m, [&](std::int64_t t, int) {
      const std::uint32_t* marks = tape.large_marks.view().row(t);
      Scalar* to = dx.row(t);
      for (std::int64_t j = 0; j < d; ++j)
        to[j] *= static_cast<Scalar>(marks[j / 32] >> j % 32 & 1);
    });
  }
  if (!shape_.up_by_input) add_up();
}

template struct SelfRoutedParameters<float>;
template struct SelfRoutedParameters<double>;
template class SelfRoutedLayer<Float64>;
template class SelfRoutedLayer<Float32>;
template class SelfRoutedLayer<Bfloat16>;

}  // namespace moesaic::converter
