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

/// Room for a single vector as a tile of any kind.
std::int64_t tile_bytes(std::int64_t cols) { return cols / 32 * kInt16TokenBytes + 64; }

// Neurons that all tokens pass before the next ones come: they stay in the second-level cache.
constexpr std::int64_t kBlockBytes = 640 * 1024;

constexpr std::int64_t kHeadBytes = 4096;  // see panels_soon()

/// One thread's scratch of the gather path.
struct Scratch {
  std::byte* x_tile;
  std::byte* z_tile;     // of the router's or the bypass's inner vector
  std::byte* input;      // NeuronInput
  float* neuron_floats;  // [d_model]
  float* sum;            // [d_model]
  std::uint32_t* keys;   // [n_experts]
  std::int32_t* ids;     // [n_active]
};

Scratch take_scratch(Workspace& w, const SecretMoeView& layer) {
  const std::int64_t d_model = layer.d_model();
  const std::int64_t inner = std::max(layer.router_rank(), layer.bypass_rank());
  return {.x_tile = w.take<std::byte>(size(tile_bytes(d_model))).data(),
          .z_tile = w.take<std::byte>(size(tile_bytes(inner))).data(),
          .input = w.take<std::byte>(size(neuron_input_bytes(d_model))).data(),
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

/// Fetches the first of these panels: a product has what follows fetched itself, but not what it
/// begins with.
[[gnu::always_inline]] inline void panels_soon(const WeightView& w, Range panels) {
  if (w.rows == 0) return;
  const std::int64_t bytes = panel_layout(w.dtype, w.cols).panel_bytes();
  const std::byte* p = w.panels + panels.begin * bytes;
  for (std::int64_t i = 0; i < std::min(panels.size() * bytes, kHeadBytes); i += 64) {
    __builtin_prefetch(p + i, 0, 2);
  }
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
                               .dtype = layer.experts.dtype,
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
      panels_soon(layer.router_v, own(layer.router_v));
      panels_soon(layer.bypass_q, own(layer.bypass_q));
      panels_soon(layer.router_u, own(layer.router_u));
      multiply_vector(ctx, layer.router_v, own(layer.router_v), x_t, s.x_tile, z);
      multiply_vector(ctx, layer.bypass_q, own(layer.bypass_q), x_t, s.x_tile, bypass_z);
      panels_soon(layer.bypass_p, own(layer.bypass_p));
      packed_neurons_soon(shared);
      ctx.pool.barrier();

      const Range panels = own(layer.router_u);
      multiply_vector(ctx, layer.router_u, panels, z, s.z_tile, scores.data());
      const std::int64_t end = std::min(panels.end * kPanelRows, n_experts);
      for (std::int64_t e = panels.begin * kPanelRows; e < end; ++e) {
        scores[size(e)] += layer.router_bias[size(e)];
      }
      // What takes no selection, while the others score: the input, bias and bypass.
      const NeuronInput input = make_neuron_input(layer.experts.dtype, x_t, d_model, s.input);
      float* y_t = y.row(t);
      std::copy(layer.bias.begin() + dims.begin, layer.bias.begin() + dims.end, y_t + dims.begin);
      multiply_vector(ctx, layer.bypass_p, own(layer.bypass_p), bypass_z, s.z_tile, y_t, true);
      std::fill_n(s.sum, d_model, 0.0f);
      add_neurons(ctx, shared, layer.phi, input, s);
      ctx.pool.barrier();

      // Every thread selects for itself: cheaper than to select once and wait for it.
      top_k(scores, own_ids, {s.keys, size(n_experts)});
      packed_neurons_soon(routed);
      if (thread == 0 && !selected.empty()) {
        std::copy(own_ids.begin(), own_ids.end(), selected.begin() + t * k);
      }
      add_neurons(ctx, routed, layer.phi, input, s);
      ctx.pool.barrier();

      for (const Scratch& other : scratch) {
        for (std::int64_t i = dims.begin; i < dims.end; ++i) y_t[i] += other.sum[i];
      }
    }
  });
}

namespace {

/// What the two paths for batches begin with: the selection, ids [n_tokens, k], y = b + P (Q x).
void route_batch(Context& ctx, const SecretMoeView& layer, ConstMatrix x, Matrix y,
                 std::span<std::int32_t> ids) {
  const std::int64_t n_experts = layer.n_experts();
  const std::int64_t k = layer.n_active;
  const int n_threads = ctx.pool.n_threads();
  const Workspace::Scope scope(ctx.workspace);
  const auto take = [&](std::int64_t cols) {
    return Matrix(ctx.workspace.take<float>(size(x.rows * cols)).data(), x.rows, cols);
  };
  const Matrix z = take(layer.router_rank());
  const Matrix bypass_z = take(layer.bypass_rank());
  const Matrix scores = take(n_experts);
  const auto keys = ctx.workspace.take<std::uint32_t>(size(n_threads * n_experts));
  const std::array<LinearOutput, 2> inner = {LinearOutput{layer.router_v, z},
                                             LinearOutput{layer.bypass_q, bypass_z}};
  linear_group(ctx, {.x = x}, inner, Traffic::Router);
  if (n_experts > 0) linear(ctx, layer.router_u, z, scores, Traffic::Router);
  ctx.pool.run([&](int thread) {
    const Range tokens = split(x.rows, n_threads, thread);
    const auto own_keys = keys.subspan(size(thread * n_experts), size(n_experts));
    for (std::int64_t t = tokens.begin; t < tokens.end; ++t) {
      std::copy(layer.bias.begin(), layer.bias.end(), y.row(t));
      const std::span<float> row(scores.row(t), size(n_experts));
      for (std::size_t e = 0; e < row.size(); ++e) row[e] += layer.router_bias[e];
      top_k(row, ids.subspan(size(t * k), size(k)), own_keys);
    }
  });
  if (layer.bypass_rank() > 0) {
    linear(ctx, layer.bypass_p, bypass_z, y, Traffic::Router, true);
  }
}

}  // namespace

void secret_moe_packed_grouped(Context& ctx, const SecretMoeView& layer, ConstMatrix x, Matrix y,
                               std::span<std::int32_t> ids) {
  route_batch(ctx, layer, x, y, ids);
  const std::int64_t d_model = layer.d_model();
  const std::int64_t n_shared = layer.n_shared();
  const std::int64_t n_neurons = n_shared + layer.n_experts();
  const std::int64_t k = layer.n_active;
  const int n_threads = ctx.pool.n_threads();
  const DType dtype = layer.experts.dtype;
  const std::int64_t input_bytes = (neuron_input_bytes(d_model) + 63) / 64 * 64;
  const std::int64_t neuron_bytes = neuron_layout(dtype, d_model).neuron_bytes();
  const Workspace::Scope scope(ctx.workspace);
  const auto input_data = ctx.workspace.take<std::byte>(size(x.rows * input_bytes));
  const auto inputs = ctx.workspace.take<NeuronInput>(size(x.rows));
  const auto partial = ctx.workspace.take<float>(size(n_threads * x.rows * d_model));
  const auto scratch = ctx.workspace.take<float>(size(n_threads * d_model));

  // How many neurons are run before neuron `end`, over all tokens: shared ones by all of them.
  const auto first_from = [&](std::int64_t t, std::int64_t expert) {
    const auto begin = ids.begin() + t * k;
    return std::lower_bound(begin, begin + k, static_cast<std::int32_t>(expert)) - begin;
  };
  const auto runs_before = [&](std::int64_t end) {
    std::int64_t runs = std::min(end, n_shared) * x.rows;
    for (std::int64_t t = 0; t < x.rows && end > n_shared; ++t)
      runs += first_from(t, end - n_shared);
    return runs;
  };
  // Every thread has a range of neurons, so that they stay in its second-level cache from token to
  // token; ranges have equal numbers of runs.
  const std::int64_t all_runs = x.rows * (n_shared + k);
  const auto border = [&](std::int64_t part) {
    std::int64_t low = 0, high = n_neurons;
    while (low < high) {
      const std::int64_t middle = (low + high) / 2;
      if (runs_before(middle) * n_threads < all_runs * part) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return part == n_threads ? n_neurons : low;
  };
  const std::int64_t block = std::max<std::int64_t>(kBlockBytes / neuron_bytes, 64);
  const auto seen_by_thread = ctx.workspace.take<std::uint8_t>(size(n_threads * block));

  ctx.pool.run([&](int thread) {
    const Range own_tokens = split(x.rows, n_threads, thread);
    for (std::int64_t t = own_tokens.begin; t < own_tokens.end; ++t) {
      inputs[size(t)] =
          make_neuron_input(dtype, x.row(t), d_model, input_data.data() + t * input_bytes);
    }
    const Matrix sums(partial.data() + thread * x.rows * d_model, x.rows, d_model);
    std::fill_n(sums.data, x.rows * d_model, 0.0f);
    const auto own_seen = seen_by_thread.subspan(size(thread * block), size(block));
    const std::int64_t begin = border(thread);
    const std::int64_t end = border(thread + 1);
    ctx.pool.barrier();

    std::int64_t n_read = 0;
    for (std::int64_t first = begin; first < end; first += block) {
      const std::int64_t last = std::min(first + block, end);
      const std::int64_t n_own_shared = std::max<std::int64_t>(std::min(last, n_shared) - first, 0);
      const std::int64_t low = std::max(first, n_shared) - n_shared;
      const std::int64_t high = std::max(last, n_shared) - n_shared;
      n_read += n_own_shared;
      const auto seen = own_seen.first(size(high - low));
      std::fill(seen.begin(), seen.end(), std::uint8_t{0});
      for (std::int64_t t = 0; t < x.rows; ++t) {
        const std::int64_t begin_id = first_from(t, low);
        const PackedNeurons lists[2] = {{.data = layer.shared_neurons,
                                         .dtype = dtype,
                                         .cols = d_model,
                                         .first = first,
                                         .count = n_own_shared},
                                        {.data = layer.expert_neurons,
                                         .dtype = dtype,
                                         .cols = d_model,
                                         .ids = ids.data() + t * k + begin_id,
                                         .count = first_from(t, high) - begin_id,
                                         .mean = layer.expert_mean.data()}};
        for (const PackedNeurons& list : lists) {
          if (list.count == 0) continue;
          add_packed_neurons(ctx, list, layer.phi, inputs[size(t)], sums.row(t),
                             scratch.data() + thread * d_model);
        }
        for (std::int64_t j = 0; j < lists[1].count; ++j) seen[size(lists[1].ids[j] - low)] = 1;
      }
      n_read += std::count(seen.begin(), seen.end(), std::uint8_t{1});
    }
    ctx.tally.add(Traffic::Experts, n_read * neuron_bytes);
  });
  add_partials(ctx, partial, y);
}

void secret_moe_packed_masked(Context& ctx, const SecretMoeView& layer, ConstMatrix x, Matrix y,
                              std::span<std::int32_t> ids) {
  route_batch(ctx, layer, x, y, ids);
  const std::int64_t n_experts = layer.n_experts();
  const std::int64_t n_shared = layer.n_shared();
  const std::int64_t k = layer.n_active;
  const Workspace::Scope scope(ctx.workspace);
  const std::int64_t n_neurons = n_shared + n_experts;
  const Matrix h(ctx.workspace.take<float>(size(x.rows * n_neurons)).data(), x.rows, n_neurons);
  gated_linear(ctx, {.x = x}, layer.phi, layer.all_gate, layer.all_up, h, Traffic::Experts);
  const int n_threads = ctx.pool.n_threads();
  ctx.pool.run([&](int thread) {
    const Range tokens = split(x.rows, n_threads, thread);
    for (std::int64_t t = tokens.begin; t < tokens.end; ++t) {
      float* routed = h.row(t) + n_shared;
      std::int64_t next = 0;
      for (std::int64_t j = 0; j < k; ++j) {
        const std::int64_t id = ids[size(t * k + j)];
        std::fill(routed + next, routed + id, 0.0f);
        routed[id] -= layer.expert_mean[size(id)];
        next = id + 1;
      }
      std::fill(routed + next, routed + n_experts, 0.0f);
    }
  });
  linear(ctx, layer.all_down, h, y, Traffic::Experts, true);
}

}  // namespace moesaic::kernels
