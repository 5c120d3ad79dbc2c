#include <algorithm>
#include <array>

#include "kernels/cpu/neuron_product.h"
#include "kernels/cpu/panel_product.h"
#include "kernels/cpu/secret_moe_paths.h"
#include "kernels/linear.h"
#include "kernels/neurons.h"
#include "kernels/panels.h"
#include "kernels/top_k.h"

namespace moesaic::kernels {
namespace {

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

std::int64_t n_panels(const WeightView& w) { return (w.rows + kPanelRows - 1) / kPanelRows; }

/// Room for a single vector as a tile of any kind.
std::int64_t tile_bytes(std::int64_t cols) { return cols / 32 * kInt16TokenBytes + 64; }

/// One thread's scratch of the gather path.
struct Scratch {
  std::byte* x_tile;
  std::byte* z_tile;        // of the router's or the bypass's inner vector
  std::byte* expert_input;  // NeuronInput
  std::byte* shared_input;  // likewise
  float* neuron_floats;     // [d_model]
  float* sum;               // [d_model]
  std::uint32_t* keys;      // [n_experts]
  std::int32_t* ids;        // [n_active]
};

Scratch take_scratch(Workspace& w, const SecretMoeView& layer) {
  const std::int64_t d_model = layer.d_model();
  const std::int64_t inner = std::max(layer.router_rank(), layer.bypass_rank());
  return {.x_tile = w.take<std::byte>(size(tile_bytes(d_model))).data(),
          .z_tile = w.take<std::byte>(size(tile_bytes(inner))).data(),
          .expert_input = w.take<std::byte>(size(neuron_input_bytes(d_model))).data(),
          .shared_input = w.take<std::byte>(size(neuron_input_bytes(d_model))).data(),
          .neuron_floats = w.take<float>(size(d_model)).data(),
          .sum = w.take<float>(size(d_model)).data(),
          .keys = w.take<std::uint32_t>(size(layer.n_experts())).data(),
          .ids = w.take<std::int32_t>(size(layer.n_active)).data()};
}

/// to[rows of the panels] (+)= W x, x [cols], on the calling thread.
void multiply_vector(Context& ctx, const WeightView& w, Range panels, const float* x,
                     std::byte* tile, float* to, bool accumulate = false) {
  if (w.rows == 0 || panels.size() == 0) return;
  make_tile(tile_kind(w.dtype), ConstMatrix(x, 1, w.cols), tile);
  multiply_panels({.panels = w.panels,
                   .dtype = w.dtype,
                   .rows = w.rows,
                   .cols = w.cols,
                   .range = panels,
                   .tiles = tile,
                   .n_tokens = 1,
                   .y = Matrix(to, 1, w.rows),
                   .accumulate = accumulate});
  ctx.tally.add(Traffic::Router, panels.size() * panel_layout(w.dtype, w.cols).panel_bytes());
}

void add_neurons(Context& ctx, const PackedNeurons& list, Activation phi, const NeuronInput& x,
                 const Scratch& s) {
  if (list.count == 0) return;
  add_packed_neurons(ctx, list, phi, x, s.sum, s.neuron_floats);
  ctx.tally.add(Traffic::Experts, list.count * neuron_layout(list.dtype, list.cols).neuron_bytes());
}

}  // namespace

void secret_moe_packed_gather(Context& ctx, const SecretMoeView& layer, ConstMatrix x, Matrix y,
                              std::span<std::int32_t> selected) {
  const std::int64_t d_model = layer.d_model();
  const std::int64_t n_experts = layer.n_experts();
  const std::int64_t k = layer.n_active;
  const int n_threads = ctx.pool.n_threads();
  const Workspace::Scope scope(ctx.workspace);
  float* z = ctx.workspace.take<float>(size(layer.router_rank())).data();
  float* bypass_z = ctx.workspace.take<float>(size(layer.bypass_rank())).data();
  const std::span<float> scores = ctx.workspace.take<float>(size(n_experts));
  const std::span<Scratch> scratch = ctx.workspace.take<Scratch>(size(n_threads));
  for (Scratch& s : scratch) s = take_scratch(ctx.workspace, layer);

  ctx.pool.run([&](int thread) {
    const Scratch& s = scratch[size(thread)];
    const std::span<std::int32_t> own_ids(s.ids, size(k));
    const Range own_shared = split(layer.n_shared(), n_threads, thread);
    const Range own_routed = split(k, n_threads, n_threads - 1 - thread);
    const PackedNeurons shared{.data = layer.shared_neurons,
                               .dtype = layer.shared.dtype,
                               .cols = d_model,
                               .first = own_shared.begin,
                               .count = own_shared.size()};
    const PackedNeurons routed{.data = layer.expert_neurons,
                               .dtype = layer.experts.dtype,
                               .cols = d_model,
                               .ids = s.ids + own_routed.begin,
                               .count = own_routed.size(),
                               .mean = layer.expert_mean.data()};
    const Range dim_panels = split((d_model + kPanelRows - 1) / kPanelRows, n_threads, thread);
    const Range dims{std::min(dim_panels.begin * kPanelRows, d_model),
                     std::min(dim_panels.end * kPanelRows, d_model)};
    const auto own = [&](const WeightView& w) { return split(n_panels(w), n_threads, thread); };
    for (std::int64_t t = 0; t < x.rows; ++t) {
      const float* x_t = x.row(t);
      packed_neurons_soon(shared);
      multiply_vector(ctx, layer.router_v, own(layer.router_v), x_t, s.x_tile, z);
      multiply_vector(ctx, layer.bypass_q, own(layer.bypass_q), x_t, s.x_tile, bypass_z);
      ctx.pool.barrier();

      const Range panels = own(layer.router_u);
      multiply_vector(ctx, layer.router_u, panels, z, s.z_tile, scores.data());
      const std::int64_t end = std::min(panels.end * kPanelRows, n_experts);
      for (std::int64_t e = panels.begin * kPanelRows; e < end; ++e) {
        scores[size(e)] += layer.router_bias[size(e)];
      }
      // What takes no selection, while the others score: the inputs, bias and bypass.
      const NeuronInput expert_input =
          make_neuron_input(layer.experts.dtype, x_t, d_model, s.expert_input);
      const NeuronInput shared_input =
          layer.shared.dtype == layer.experts.dtype
              ? expert_input
              : make_neuron_input(layer.shared.dtype, x_t, d_model, s.shared_input);
      float* y_t = y.row(t);
      std::copy(layer.bias.begin() + dims.begin, layer.bias.begin() + dims.end, y_t + dims.begin);
      multiply_vector(ctx, layer.bypass_p, own(layer.bypass_p), bypass_z, s.z_tile, y_t, true);
      std::fill_n(s.sum, d_model, 0.0f);
      add_neurons(ctx, shared, layer.phi, shared_input, s);
      ctx.pool.barrier();

      // Every thread selects for itself: cheaper than to select once and wait for it.
      top_k(scores, own_ids, {s.keys, size(n_experts)});
      packed_neurons_soon(routed);
      if (thread == 0 && !selected.empty()) {
        std::copy(own_ids.begin(), own_ids.end(), selected.begin() + t * k);
      }
      add_neurons(ctx, routed, layer.phi, expert_input, s);
      ctx.pool.barrier();

      for (const Scratch& other : scratch) {
        for (std::int64_t i = dims.begin; i < dims.end; ++i) y_t[i] += other.sum[i];
      }
    }
  });
}

void secret_moe_packed_masked(Context& ctx, const SecretMoeView& layer, ConstMatrix x, Matrix y,
                              std::span<std::int32_t> ids) {
  const std::int64_t n_experts = layer.n_experts();
  const std::int64_t n_shared = layer.n_shared();
  const std::int64_t k = layer.n_active;
  const int n_threads = ctx.pool.n_threads();
  const Workspace::Scope scope(ctx.workspace);
  const auto take = [&](std::int64_t cols) {
    return Matrix(ctx.workspace.take<float>(size(x.rows * cols)).data(), x.rows, cols);
  };
  const Matrix z = take(layer.router_rank());
  const Matrix bypass_z = take(layer.bypass_rank());
  const Matrix scores = take(n_experts);
  const Matrix h = take(n_shared + n_experts);
  const auto keys = ctx.workspace.take<std::uint32_t>(size(n_threads * n_experts));

  const std::array<LinearOutput, 2> inner = {LinearOutput{layer.router_v, z},
                                             LinearOutput{layer.bypass_q, bypass_z}};
  linear_group(ctx, {.x = x}, inner, Traffic::Router);
  if (n_experts > 0) linear(ctx, layer.router_u, z, scores, Traffic::Router);
  gated_linear(ctx, {.x = x}, layer.phi, layer.all_gate, layer.all_up, h, Traffic::Experts);
  ctx.pool.run([&](int thread) {
    const Range tokens = split(x.rows, n_threads, thread);
    const auto own_keys = keys.subspan(size(thread * n_experts), size(n_experts));
    for (std::int64_t t = tokens.begin; t < tokens.end; ++t) {
      std::copy(layer.bias.begin(), layer.bias.end(), y.row(t));
      const std::span<float> row(scores.row(t), size(n_experts));
      for (std::size_t e = 0; e < row.size(); ++e) row[e] += layer.router_bias[e];
      const auto chosen = ids.subspan(size(t * k), size(k));
      top_k(row, chosen, own_keys);
      // The scores have served; their row takes the activations that count.
      float* routed = h.row(t) + n_shared;
      std::fill(row.begin(), row.end(), 0.0f);
      for (const std::int32_t id : chosen) row[size(id)] = routed[id] - layer.expert_mean[size(id)];
      std::copy(row.begin(), row.end(), routed);
    }
  });
  if (layer.bypass_rank() > 0) {
    linear(ctx, layer.bypass_p, bypass_z, y, Traffic::Router, true);
  }
  linear(ctx, layer.all_down, h, y, Traffic::Experts, true);
}

}  // namespace moesaic::kernels
