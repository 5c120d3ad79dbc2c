// Machines without AVX2 take the portable code: two more instruction sets are not worth their
// compile time.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/secret_moe_gather.cc"
#include "hwy/foreach_target.h"  // compiles this file once per instruction set
// The namespace macros of highway.h belong to the target that foreach_target.h has just set.
#include "hwy/highway.h"
//
#include <algorithm>

#include "kernels/cpu/dot-inl.h"
#include "kernels/cpu/matvec.h"
#include "kernels/cpu/secret_moe_paths.h"
#include "kernels/linear.h"
#include "kernels/top_k.h"

HWY_BEFORE_NAMESPACE();
namespace moesaic::kernels {
namespace HWY_NAMESPACE {
namespace {

void neurons(Context& ctx, const Neurons& list, Activation phi, const float* x, float* y) {
  const auto* base = reinterpret_cast<const std::uint8_t*>(list.rows.data);
  const std::int64_t row = list.rows.row_bytes();
  const auto cols = static_cast<std::size_t>(list.rows.cols);
  const bool round = ctx.activations == Activations::BF16;
  const float* const xs[1] = {x};
  visit_format(list.rows.dtype, [&](auto format) HWY_ATTR {
    for (std::int64_t first = 0; first < list.count; first += kNeuronBatch) {
      const std::int64_t n = std::min(kNeuronBatch, list.count - first);
      float gate[kNeuronBatch];
      float up[kNeuronBatch];
      float h[kNeuronBatch];
      for (std::int64_t j = 0; j < n; ++j) {
        prefetch_neuron(list, first + j + kPrefetchNeurons);
        const std::uint8_t* at = base + 3 * list.id(first + j) * row;
        float product[1];
        dot(format, at, cols, xs, product);
        gate[j] = product[0];
        dot(format, at + row, cols, xs, product);
        up[j] = product[0];
      }
      gated_activation(ctx, phi, ConstMatrix(gate, 1, n), ConstMatrix(up, 1, n), Matrix(h, 1, n));
      if (list.mean != nullptr) {
        for (std::int64_t j = 0; j < n; ++j) h[j] -= list.mean[list.id(first + j)];
      }
      if (round) round_bf16(h, static_cast<std::size_t>(n), h);
      std::int64_t j = 0;
      for (; j + 4 <= n; j += 4) {
        const std::uint8_t* down[4];
        float scale[4];
        for (std::int64_t i = 0; i < 4; ++i) {
          down[i] = base + (3 * list.id(first + j + i) + 2) * row;
          scale[i] = h[j + i];
        }
        add_scaled(format, down, cols, scale, y);
      }
      for (; j < n; ++j) {
        const std::uint8_t* const down[1] = {base + (3 * list.id(first + j) + 2) * row};
        const float scale[1] = {h[j]};
        add_scaled(format, down, cols, scale, y);
      }
    }
  });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moesaic::kernels {

HWY_EXPORT(neurons);

void add_neurons_soon(const Neurons& list) {
  for (std::int64_t j = 0; j < kPrefetchNeurons; ++j) prefetch_neuron(list, j);
}

void add_neurons(Context& ctx, const Neurons& list, Activation phi, const float* x, float* y) {
  if (list.count == 0) return;
  HWY_DYNAMIC_DISPATCH(neurons)(ctx, list, phi, x, y);
  ctx.tally.add(Traffic::Experts, 3 * list.count * list.rows.row_bytes());
}

void secret_moe_gather(Context& ctx, const SecretMoeView& layer, ConstMatrix x, Matrix y,
                       std::span<std::int32_t> selected) {
  const std::int64_t d_model = layer.d_model();
  const std::int64_t n_experts = layer.n_experts();
  const std::int64_t n_shared = layer.n_shared();
  const std::int64_t k = layer.n_active;
  const int n_threads = ctx.pool.n_threads();
  const auto threads = static_cast<std::size_t>(n_threads);
  const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
  const bool round = ctx.activations == Activations::BF16;

  const Workspace::Scope scope(ctx.workspace);
  const auto z = ctx.workspace.take<float>(size(layer.router_rank()));
  const auto bypass_z = ctx.workspace.take<float>(size(layer.bypass_rank()));
  const auto scores = ctx.workspace.take<float>(size(n_experts));
  const auto keys = ctx.workspace.take<std::uint32_t>(threads * size(n_experts));
  const auto ids = ctx.workspace.take<std::int32_t>(threads * size(k));
  const auto sums = ctx.workspace.take<float>(threads * size(d_model));

  // z[range] = W[range, :] x_t
  const auto project = [&](const WeightView& w, Range range, ConstMatrix x_t, std::span<float> to) {
    matvec_rows(w, range, x_t, Matrix(to.data(), 1, w.rows));
    ctx.tally.add(Traffic::Router, range.size() * w.row_bytes());
    if (round) {
      const auto part = to.subspan(size(range.begin), size(range.size()));
      round_to_bf16(part, part);
    }
  };

  ctx.pool.run([&](int thread) {
    const auto own_keys =
        keys.subspan(static_cast<std::size_t>(thread) * size(n_experts), size(n_experts));
    const auto own_ids = ids.subspan(static_cast<std::size_t>(thread) * size(k), size(k));
    float* own_sum = sums.data() + static_cast<std::size_t>(thread) * size(d_model);
    // Both kinds are cut evenly: shared neurons stream, selected ones are scattered and take
    // longer.
    const Range own_shared = split(n_shared, n_threads, thread);
    const Range own_routed = split(k, n_threads, n_threads - 1 - thread);
    const Neurons shared{
        .rows = layer.shared, .first = own_shared.begin, .count = own_shared.size()};
    for (std::int64_t t = 0; t < x.rows; ++t) {
      const ConstMatrix x_t = x.slice(t, 1);
      add_neurons_soon(shared);
      project(layer.router_v, split(layer.router_rank(), n_threads, thread), x_t, z);
      project(layer.bypass_q, split(layer.bypass_rank(), n_threads, thread), x_t, bypass_z);
      ctx.pool.barrier();

      const Range experts = split(n_experts, n_threads, thread);
      const ConstMatrix z_row(z.data(), 1, layer.router_rank());
      matvec_rows(layer.router_u, experts, z_row, Matrix(scores.data(), 1, n_experts));
      ctx.tally.add(Traffic::Router, experts.size() * layer.router_u.row_bytes());
      for (std::int64_t e = experts.begin; e < experts.end; ++e) {
        scores[size(e)] += layer.router_bias[size(e)];
      }
      ctx.pool.barrier();

      // Every thread selects for itself: cheaper than to select once and wait for it.
      top_k(scores, own_ids, own_keys);
      if (thread == 0 && !selected.empty()) {
        std::copy(own_ids.begin(), own_ids.end(), selected.begin() + t * k);
      }

      // The bypass before the last barrier: after it, z may already be the next token's.
      const Range dims = split(d_model, n_threads, thread, 16);
      const Matrix y_t = y.slice(t, 1);
      std::copy(layer.bias.begin() + dims.begin, layer.bias.begin() + dims.end,
                y_t.data + dims.begin);
      if (!layer.bypass_p.empty()) {
        matvec_rows(layer.bypass_p, dims, ConstMatrix(bypass_z.data(), 1, layer.bypass_rank()), y_t,
                    true);
        ctx.tally.add(Traffic::Router, dims.size() * layer.bypass_p.row_bytes());
      }

      std::fill_n(own_sum, d_model, 0.0f);
      const Neurons routed{.rows = layer.experts,
                           .ids = own_ids.data() + own_routed.begin,
                           .count = own_routed.size(),
                           .mean = layer.expert_mean.data()};
      add_neurons_soon(routed);
      add_neurons(ctx, shared, layer.phi, x_t.data, own_sum);
      add_neurons(ctx, routed, layer.phi, x_t.data, own_sum);
      ctx.pool.barrier();

      for (std::size_t i = 0; i < threads; ++i) {
        const float* sum = sums.data() + i * size(d_model);
        for (std::int64_t d = dims.begin; d < dims.end; ++d) y_t.data[d] += sum[d];
      }
    }
  });
}

}  // namespace moesaic::kernels
#endif  // HWY_ONCE
