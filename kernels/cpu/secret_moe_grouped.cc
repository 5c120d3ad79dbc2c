// Machines without AVX2 take the portable code: two more instruction sets are not worth their
// compile time.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/secret_moe_grouped.cc"
#include "hwy/foreach_target.h"  // compiles this file once per instruction set
// The namespace macros of highway.h belong to the target that foreach_target.h has just set.
#include "hwy/highway.h"
//
#include <algorithm>
#include <numeric>

#include "kernels/cpu/dot-inl.h"
#include "kernels/cpu/secret_moe_paths.h"
#include "kernels/linear.h"
#include "kernels/quant.h"

HWY_BEFORE_NAMESPACE();
namespace moesaic::kernels {
namespace HWY_NAMESPACE {
namespace {

/// out[i] = row · x[tokens[i]], row unpacked.
void dot_tokens(const float* row, ConstMatrix x, const std::int32_t* tokens, std::int64_t n,
                float* out) {
  const auto* packed = reinterpret_cast<const std::uint8_t*>(row);
  for (std::int64_t i = 0; i < n; i += 4) {
    const float* xs[4];
    for (std::int64_t j = 0; j < 4; ++j) xs[j] = x.row(tokens[std::min(i + j, n - 1)]);
    float products[4];
    dot(kPlain, packed, static_cast<std::size_t>(x.cols), xs, products);
    for (std::int64_t j = 0; j < 4 && i + j < n; ++j) out[i + j] = products[j];
  }
}

/// y[tokens[i]] += scale[i] · row, row unpacked.
void add_to_tokens(const float* row, const float* scale, const std::int32_t* tokens, std::int64_t n,
                   Matrix y) {
  const std::uint8_t* const packed[1] = {reinterpret_cast<const std::uint8_t*>(row)};
  for (std::int64_t i = 0; i < n; ++i) {
    const float scales[1] = {scale[i]};
    add_scaled(kPlain, packed, static_cast<std::size_t>(y.cols), scales, y.row(tokens[i]));
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace moesaic::kernels
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moesaic::kernels {
namespace {

HWY_EXPORT(dot_tokens);
HWY_EXPORT(add_to_tokens);

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

/// Which tokens selected an expert: tokens[first[e] .. first[e + 1]), ascending.
struct Lists {
  std::span<std::int32_t> first;   // [n_experts + 1]
  std::span<std::int32_t> tokens;  // [n_tokens · n_active]
};

/// By counting: histogram, prefix sum, then each token goes to the next place of its experts.
Lists group_by_expert(Workspace& workspace, std::span<const std::int32_t> ids, std::int64_t k,
                      std::int64_t n_experts) {
  const Lists lists{workspace.take<std::int32_t>(size(n_experts + 1)),
                    workspace.take<std::int32_t>(ids.size())};
  // Places are counted one entry further on and end up where they belong when all are given out.
  std::fill(lists.first.begin(), lists.first.end(), 0);
  for (const std::int32_t id : ids) {
    if (id + 2 <= n_experts) ++lists.first[size(id + 2)];
  }
  std::partial_sum(lists.first.begin(), lists.first.end(), lists.first.begin());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const auto place = static_cast<std::size_t>(lists.first[size(ids[i] + 1)]++);
    lists.tokens[place] = static_cast<std::int32_t>(static_cast<std::int64_t>(i) / k);
  }
  return lists;
}

}  // namespace

void secret_moe_grouped(Context& ctx, const SecretMoeView& layer, ConstMatrix x,
                        std::span<const std::int32_t> ids, Matrix y) {
  const std::int64_t d_model = layer.d_model();
  const std::int64_t n_experts = layer.n_experts();
  const std::int64_t n_shared = layer.n_shared();
  const std::int64_t n_tokens = x.rows;
  const int n_threads = ctx.pool.n_threads();
  const Workspace::Scope scope(ctx.workspace);
  const Lists lists = group_by_expert(ctx.workspace, ids, layer.n_active, n_experts);
  const auto all_tokens = ctx.workspace.take<std::int32_t>(size(n_tokens));
  std::iota(all_tokens.begin(), all_tokens.end(), 0);
  const auto partial = ctx.workspace.take<float>(size(n_threads * n_tokens * d_model));
  const std::int64_t scratch_size = 3 * d_model + 2 * n_tokens;
  const auto scratch = ctx.workspace.take<float>(size(n_threads * scratch_size));

  // Shared neurons come first, then the experts. To unpack a neuron takes about as long as to run
  // it for a token.
  const auto tokens_of = [&](std::int64_t neuron) -> std::span<const std::int32_t> {
    if (neuron < n_shared) return all_tokens;
    const auto begin = static_cast<std::size_t>(lists.first[size(neuron - n_shared)]);
    const auto end = static_cast<std::size_t>(lists.first[size(neuron - n_shared + 1)]);
    return lists.tokens.subspan(begin, end - begin);
  };
  const auto cost = [&](std::int64_t neuron) {
    const auto n = static_cast<std::int64_t>(tokens_of(neuron).size());
    return n == 0 ? 0 : n + 1;
  };
  std::int64_t total = 0;
  for (std::int64_t i = 0; i < n_shared + n_experts; ++i) total += cost(i);

  ctx.pool.run([&](int thread) {
    const Matrix sum(partial.data() + thread * n_tokens * d_model, n_tokens, d_model);
    std::fill_n(sum.data, n_tokens * d_model, 0.0f);
    float* rows = scratch.data() + thread * scratch_size;
    float* gate = rows + 3 * d_model;
    float* up = gate + n_tokens;
    const std::int64_t begin = total * thread / n_threads;
    const std::int64_t end = total * (thread + 1) / n_threads;
    std::int64_t bytes = 0;
    std::int64_t at = 0;
    for (std::int64_t i = 0; i < n_shared + n_experts && at < end; ++i) {
      const std::int64_t own_cost = cost(i);
      const bool mine = own_cost > 0 && at >= begin;
      at += own_cost;
      if (!mine) continue;
      const bool shared = i < n_shared;
      const std::int64_t id = shared ? i : i - n_shared;
      const WeightView& weights = shared ? layer.shared : layer.experts;
      const std::span<const std::int32_t> tokens = tokens_of(i);
      const auto n = static_cast<std::int64_t>(tokens.size());
      if (n == 1) {
        add_neurons(ctx,
                    {.rows = weights,
                     .first = id,
                     .count = 1,
                     .mean = shared ? nullptr : layer.expert_mean.data()},
                    layer.phi, x.row(tokens[0]), sum.row(tokens[0]));
        continue;
      }
      for (std::int64_t r = 0; r < 3; ++r) {
        dequantize_row(weights.dtype, weights.row(3 * id + r), {rows + r * d_model, size(d_model)});
      }
      bytes += 3 * weights.row_bytes();
      HWY_DYNAMIC_DISPATCH(dot_tokens)(rows, x, tokens.data(), n, gate);
      HWY_DYNAMIC_DISPATCH(dot_tokens)(rows + d_model, x, tokens.data(), n, up);
      // One row at a time runs on the calling thread.
      gated_activation(ctx, layer.phi, ConstMatrix(gate, 1, n), ConstMatrix(up, 1, n),
                       Matrix(gate, 1, n));
      if (!shared) {
        for (std::int64_t j = 0; j < n; ++j) gate[j] -= layer.expert_mean[size(id)];
      }
      if (ctx.activations == Activations::BF16) {
        round_to_bf16({gate, size(n)}, {gate, size(n)});
      }
      HWY_DYNAMIC_DISPATCH(add_to_tokens)(rows + 2 * d_model, gate, tokens.data(), n, sum);
    }
    ctx.tally.add(Traffic::Experts, bytes);
  });
  add_partials(ctx, partial, y);
}

}  // namespace moesaic::kernels
#endif  // HWY_ONCE
