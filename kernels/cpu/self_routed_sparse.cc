#include "kernels/cpu/self_routed_sparse.h"

#include <algorithm>

#include "kernels/columns.h"
#include "kernels/cpu/column_product.h"
#include "kernels/cpu/neuron_product.h"
#include "kernels/neurons.h"
#include "kernels/rms_norm.h"
#include "kernels/thresholds.h"

namespace moesaic::kernels {
namespace {

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

std::int64_t up_row_bytes(const SelfRoutedView& layer) {
  return neuron_layout(layer.w_up.dtype, layer.d_model()).single_row_bytes();
}

// Time per byte over the dense path's: columns and rows come line by line, of which a core keeps
// some two dozen on their way, while panels stream. d_model 576, d_ff 1536, .55 of the inputs, .58
// routed, .37 kept, weights from memory, one (two) threads of a Zen 4, µs per layer, dense against
// sparse: Q4_1 72 : 81 (49 : 60) with .585 of the bytes, Q8_0 126 : 107 (76 : 67) with .53, BF16
// 326 : 184 with .50.
double byte_cost(DType dtype) {
  switch (dtype) {
    case DType::BF16:
      return 1.3;
    case DType::Q8_0:
      return 1.65;
    default:
      return 2.1;
  }
}

/// One thread's scratch, and what it counted.
struct Scratch {
  float* x;              // [d_model], normed
  float* large;          // [d_model], x̂
  std::byte* columns;    // ColumnInput of x̂ or h
  std::byte* row;        // NeuronInput of x
  std::uint32_t* marks;  // [max(d_model, d_ff) / 32]
  std::int32_t* ids;     // [d_ff + 16]
  std::int64_t n_inputs = 0;
  NeuronCounts neurons = {};
};

Scratch take_scratch(Workspace& w, const SelfRoutedView& layer) {
  const std::int64_t d_model = layer.d_model(), d_ff = layer.d_ff();
  const std::int64_t longer = std::max(d_model, d_ff);
  return {.x = w.take<float>(size(d_model)).data(),
          .large = w.take<float>(size(d_model)).data(),
          .columns = w.take<std::byte>(size(column_input_bytes(longer))).data(),
          .row = w.take<std::byte>(size(neuron_input_bytes(d_model))).data(),
          .marks = w.take<std::uint32_t>(size(longer / 32)).data(),
          .ids = w.take<std::int32_t>(size(d_ff + 16)).data()};
}

// What the threads share: a neuron's gate, then its activation, and its up product.
struct Neurons {
  float* gate;  // [d_ff]
  float* up;    // [d_ff]
};

/// h of the thread's own neurons from one token, marked; returns the bytes read.
std::int64_t run_neurons(const SelfRoutedView& layer, const float* x, Range own, const Neurons& to,
                         Scratch& s) {
  const std::int64_t d_model = layer.d_model();
  s.n_inputs += keep_large(x, layer.input_threshold.data(), size(d_model), s.large, s.marks);
  ColumnInput large = make_column_input(layer.w_gate.dtype, s.large, s.marks, d_model, s.columns);
  const auto by_columns = [&](const std::byte* columns, const WeightView& w, float* y) {
    return multiply_columns(
        {.columns = columns, .dtype = w.dtype, .rows = w.rows, .range = own, .y = y}, large);
  };
  std::int64_t bytes = by_columns(layer.gate_columns, layer.w_gate, to.gate);
  if (layer.up_by_input) {
    if (layer.w_up.dtype != layer.w_gate.dtype) {
      large = make_column_input(layer.w_up.dtype, s.large, s.marks, d_model, s.columns);
    }
    bytes += by_columns(layer.up_parts, layer.w_up, to.up);
  }
  float* gate = to.gate + own.begin;
  const std::span<float> activated(gate, size(own.size()));
  activation(layer.phi, activated, activated);
  const float* threshold = nullptr;
  if (!layer.up_by_input) {
    threshold = layer.gate_threshold.data() + own.begin;
    keep_large(gate, threshold, size(own.size()), nullptr, s.marks);
    const ListedRows routed{.data = layer.up_parts + own.begin * up_row_bytes(layer),
                            .dtype = layer.w_up.dtype,
                            .cols = d_model,
                            .ids = s.ids,
                            .count = list_marked(s.marks, own.size(), s.ids)};
    multiply_rows(routed, make_neuron_input(layer.w_up.dtype, x, d_model, s.row),
                  to.up + own.begin);
    bytes += routed.count * up_row_bytes(layer);
  }
  const NeuronCounts counts =
      keep_neurons(gate, to.up + own.begin, threshold, layer.hidden_threshold.data() + own.begin,
                   size(own.size()), gate, s.marks);
  s.neurons.routed += counts.routed;
  s.neurons.kept += counts.kept;
  return bytes;
}

}  // namespace

std::int64_t self_routed_sparse(Context& ctx, const SelfRoutedView& layer, const LinearInput& input,
                                Matrix y) {
  const std::int64_t d_model = layer.d_model(), d_ff = layer.d_ff(), n_tokens = y.rows;
  const int n_threads = ctx.pool.n_threads();
  const Workspace::Scope scope(ctx.workspace);
  const Neurons neurons{.gate = ctx.workspace.take<float>(size(d_ff)).data(),
                        .up = ctx.workspace.take<float>(size(d_ff)).data()};
  const auto partial = ctx.workspace.take<float>(size(n_threads * n_tokens * d_model));
  const std::span<Scratch> scratch = ctx.workspace.take<Scratch>(size(n_threads));
  for (Scratch& s : scratch) s = take_scratch(ctx.workspace, layer);

  ctx.pool.run([&](int thread) {
    Scratch& s = scratch[size(thread)];
    const Range own = split(d_ff, n_threads, thread, kColumnRows);
    const std::int64_t first_unit = own.begin / 32;
    const ColumnLayout layout = column_layout(layer.w_down.dtype, d_model);
    const Matrix sums(partial.data() + thread * n_tokens * d_model, n_tokens, d_model);
    std::int64_t bytes = 0;
    for (std::int64_t t = 0; t < n_tokens; ++t) {
      const float* x = input.x.row(t);
      if (!input.norm.empty()) {
        // One row at a time runs on the calling thread.
        rms_norm(ctx, input.x.slice(t, 1), input.norm, input.eps, Matrix(s.x, 1, d_model));
        x = s.x;
      }
      bytes += run_neurons(layer, x, own, neurons, s);
      const ColumnInput kept = make_column_input(layer.w_down.dtype, neurons.gate + own.begin,
                                                 s.marks, own.size(), s.columns);
      bytes += multiply_columns({.columns = layer.down_columns + first_unit * layout.unit_bytes(),
                                 .dtype = layer.w_down.dtype,
                                 .rows = d_model,
                                 .range = {0, d_model},
                                 .y = sums.row(t)},
                                kept);
    }
    ctx.tally.add(Traffic::Mlp, bytes);
    ctx.pool.barrier();
    const Range dims = split(d_model, n_threads, thread, 16);
    for (std::int64_t t = 0; t < n_tokens; ++t) {
      float* to = y.row(t);
      std::copy(partial.data() + t * d_model + dims.begin, partial.data() + t * d_model + dims.end,
                to + dims.begin);
      for (std::int64_t other = 1; other < n_threads; ++other) {
        const float* from = partial.data() + (other * n_tokens + t) * d_model;
        for (std::int64_t i = dims.begin; i < dims.end; ++i) to[i] += from[i];
      }
    }
  });
  NeuronCounts counts;
  for (const Scratch& s : scratch) {
    counts.routed += s.neurons.routed;
    counts.kept += s.neurons.kept;
  }
  // Linear in all three; every thread counted the same inputs.
  return multiply_adds(layer, scratch[0].n_inputs, counts.routed, counts.kept);
}

double sparse_cost(const SelfRoutedView& layer) {
  const auto columns = [](const WeightView& w, float share) {
    const ColumnLayout layout = column_layout(w.dtype, w.rows);
    return byte_cost(w.dtype) *
           (static_cast<double>(w.cols / 32 * layout.scale_bytes) +
            static_cast<double>(w.cols * layout.column_bytes) * static_cast<double>(share));
  };
  const double up = layer.up_by_input
                        ? columns(layer.w_up, layer.input_share)
                        : byte_cost(layer.w_up.dtype) *
                              static_cast<double>(layer.d_ff() * up_row_bytes(layer)) *
                              static_cast<double>(layer.gate_share);
  return columns(layer.w_gate, layer.input_share) + up + columns(layer.w_down, layer.hidden_share);
}

}  // namespace moesaic::kernels
