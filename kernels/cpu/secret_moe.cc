#include "kernels/secret_moe.h"

#include <algorithm>
#include <cmath>

#include "kernels/base/error.h"
#include "kernels/cpu/matvec.h"
#include "kernels/cpu/part_shapes.h"
#include "kernels/cpu/secret_moe_paths.h"
#include "kernels/cpu/target.h"
#include "kernels/linear.h"
#include "kernels/panels.h"
#include "kernels/top_k.h"

namespace moesaic::kernels {
namespace {

// Tokens that are routed and kept together: bounds the scratch, and from here on a product is as
// fast as it gets.
constexpr std::int64_t kChunk = 512;

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

constexpr PartShapes kParts = {"secret MoE"};

}  // namespace

void check_shapes(const SecretMoeView& layer) {
  const std::int64_t d_model = layer.d_model();
  require<ShapeError>(d_model > 0, "secret MoE: bias is empty, expected d_model elements");
  require<ShapeError>(
      layer.shared.rows % 3 == 0 && layer.experts.rows % 3 == 0,
      "secret MoE: shared and experts have {} and {} rows, expected three per neuron",
      layer.shared.rows, layer.experts.rows);
  if (layer.n_shared() > 0) kParts.weight("shared", layer.shared, layer.shared.rows, d_model);
  const std::int64_t n_experts = layer.n_experts();
  require<ShapeError>(layer.n_active >= 0 && layer.n_active <= n_experts,
                      "secret MoE: n_active is {}, expected 0 to {}", layer.n_active, n_experts);
  if (n_experts > 0) {
    kParts.weight("experts", layer.experts, layer.experts.rows, d_model);
    kParts.weight("router V", layer.router_v, layer.router_rank(), d_model);
    kParts.weight("router U", layer.router_u, n_experts, layer.router_rank());
  } else {
    require<ShapeError>(layer.router_v.rows == 0 && layer.router_u.rows == 0,
                        "secret MoE: router has {} and {} rows, expected none without experts",
                        layer.router_v.rows, layer.router_u.rows);
  }
  kParts.length("mean", layer.expert_mean.size(), n_experts);
  kParts.length("router bias", layer.router_bias.size(), n_experts);
  if (!layer.bypass_q.empty() || !layer.bypass_p.empty()) {
    kParts.weight("bypass Q", layer.bypass_q, layer.bypass_rank(), d_model);
    kParts.weight("bypass P", layer.bypass_p, d_model, layer.bypass_rank());
  }
}

void route(Context& ctx, const SecretMoeView& layer, ConstMatrix x, std::span<std::int32_t> ids) {
  const std::int64_t n_experts = layer.n_experts();
  if (n_experts == 0) return;
  const int n_threads = ctx.pool.n_threads();
  const Workspace::Scope scope(ctx.workspace);
  const auto z = ctx.workspace.take<float>(size(x.rows * layer.router_rank()));
  const auto scores = ctx.workspace.take<float>(size(x.rows * n_experts));
  const auto keys =
      ctx.workspace.take<std::uint32_t>(static_cast<std::size_t>(n_threads) * size(n_experts));
  ctx.pool.run([&](int thread) {
    const Range tokens = split(x.rows, n_threads, thread);
    if (tokens.size() == 0) return;
    const Matrix z_part =
        Matrix(z.data(), x.rows, layer.router_rank()).slice(tokens.begin, tokens.size());
    const Matrix part = Matrix(scores.data(), x.rows, n_experts).slice(tokens.begin, tokens.size());
    matvec_rows(layer.router_v, {0, layer.router_rank()}, x.slice(tokens.begin, tokens.size()),
                z_part);
    if (ctx.activations == Activations::BF16) {
      const std::span<float> all(z_part.data, size(z_part.rows * z_part.cols));
      round_to_bf16(all, all);
    }
    matvec_rows(layer.router_u, {0, n_experts}, z_part, part);
    const auto own_keys =
        keys.subspan(static_cast<std::size_t>(thread) * size(n_experts), size(n_experts));
    for (std::int64_t t = 0; t < part.rows; ++t) {
      const std::span<float> row(part.row(t), size(n_experts));
      for (std::size_t e = 0; e < row.size(); ++e) row[e] += layer.router_bias[e];
      top_k(row, ids.subspan(size((tokens.begin + t) * layer.n_active), size(layer.n_active)),
            own_keys);
    }
  });
  ctx.tally.add(Traffic::Router, layer.router_v.bytes() + layer.router_u.bytes());
}

void bias_and_bypass(Context& ctx, const SecretMoeView& layer, ConstMatrix x, Matrix y) {
  for (std::int64_t t = 0; t < y.rows; ++t) {
    std::copy(layer.bias.begin(), layer.bias.end(), y.row(t));
  }
  if (layer.bypass_p.empty()) return;
  const Workspace::Scope scope(ctx.workspace);
  const auto z = ctx.workspace.take<float>(size(x.rows * layer.bypass_rank()));
  const Matrix z_rows(z.data(), x.rows, layer.bypass_rank());
  linear(ctx, layer.bypass_q, x, z_rows, Traffic::Router);
  linear(ctx, layer.bypass_p, z_rows, y, Traffic::Router, true);
}

void add_partials(Context& ctx, std::span<const float> partial, Matrix y) {
  const int n_threads = ctx.pool.n_threads();
  ctx.pool.run([&](int thread) {
    const Range tokens = split(y.rows, n_threads, thread);
    for (std::int64_t t = tokens.begin; t < tokens.end; ++t) {
      for (std::int64_t i = 0; i < n_threads; ++i) {
        const float* from = partial.data() + (i * y.rows + t) * y.cols;
        float* to = y.row(t);
        for (std::int64_t d = 0; d < y.cols; ++d) to[d] += from[d];
      }
    }
  });
}

bool uses_packed(const Context& ctx, const SecretMoeView& layer) {
  return ctx.activations == Activations::Q16 && layer.all_down.panels != nullptr;
}

double distinct_neurons(const SecretMoeView& layer, std::int64_t n_tokens) {
  const auto n_experts = static_cast<double>(layer.n_experts());
  if (n_experts == 0) return static_cast<double>(layer.n_shared());
  const double missed = std::pow(1 - static_cast<double>(layer.n_active) / n_experts, n_tokens);
  return static_cast<double>(layer.n_shared()) + n_experts * (1 - missed);
}

PathCosts packed_path_costs(const SecretMoeView& layer, std::int64_t n_tokens) {
  const PathConstants& c = layer.costs;
  const auto d_model = static_cast<double>(layer.d_model());
  const auto tokens = static_cast<double>(n_tokens);
  const double all = static_cast<double>(layer.n_shared() + layer.n_experts()) * d_model;
  const double active = static_cast<double>(layer.n_shared() + layer.n_active) * d_model;
  return {.gather = c.gather * tokens * active,
          .grouped = c.grouped * tokens * active +
                     c.grouped_read * distinct_neurons(layer, n_tokens) * d_model,
          .masked = std::max(c.masked * tokens, c.masked_least) * all};
}

// SmolLM2-135M's layer (d_model 576, 128 shared and 384 of 1,408 experts in Q4_1), one thread of a
// Zen 4, µs of CPU time per call, float32 (bfloat16), without
// packed weights:
//
//   tokens        1     4     8    16    32    64     512
//   gather      118   660  1045  1835  3714  7711   55677
//   grouped     282   716  1107  1824  2558  4125   41545 (45420)
//   masked     1123  1402  1502  2064  4191  6418   44113 (25073)
//
// Gather has three barriers a token, which a busy machine makes expensive; grouped has five calls
// of the pool a batch.
MoePath choose_moe_path(const Context& ctx, const SecretMoeView& layer, std::int64_t n_tokens) {
  if (uses_packed(ctx, layer)) {
    const PathCosts costs = packed_path_costs(layer, n_tokens);
    if (costs.gather <= std::min(costs.grouped, costs.masked)) return MoePath::Gather;
    return costs.grouped <= costs.masked ? MoePath::Grouped : MoePath::Masked;
  }
  if (n_tokens <= 4) return MoePath::Gather;
  return n_tokens <= 64 ? MoePath::Grouped : MoePath::Masked;
}

void secret_moe(Context& ctx, const SecretMoeView& layer, ConstMatrix x, Matrix y, MoePath path,
                std::span<std::int32_t> selected) {
  check_shapes(layer);
  require<ShapeError>(x.cols == layer.d_model() && y.cols == x.cols && y.rows == x.rows,
                      "secret MoE: x is [{}, {}], y is [{}, {}], expected both [{}, {}]", x.rows,
                      x.cols, y.rows, y.cols, x.rows, layer.d_model());
  require<ShapeError>(selected.empty() || selected.size() == size(x.rows * layer.n_active),
                      "secret MoE: room for {} selected ids, expected {}", selected.size(),
                      x.rows * layer.n_active);
  if (x.rows == 0) return;
  obey_target_environment();
  if (path == MoePath::Auto) path = choose_moe_path(ctx, layer, x.rows);

  for (std::int64_t first = 0; first < x.rows; first += kChunk) {
    const std::int64_t n = std::min(kChunk, x.rows - first);
    const Workspace::Scope scope(ctx.workspace);
    ConstMatrix x_part = x.slice(first, n);
    const Matrix y_part = y.slice(first, n);
    if (ctx.activations == Activations::BF16) {
      const auto rounded = ctx.workspace.take<float>(size(n * x.cols));
      const Matrix to(rounded.data(), n, x.cols);
      for (std::int64_t t = 0; t < n; ++t) {
        round_to_bf16({x_part.row(t), size(x.cols)}, {to.row(t), size(x.cols)});
      }
      x_part = to;
    }
    std::span<std::int32_t> ids =
        selected.empty() ? selected
                         : selected.subspan(size(first * layer.n_active), size(n * layer.n_active));
    if (uses_packed(ctx, layer)) {
      if (path == MoePath::Gather) {
        secret_moe_packed_gather(ctx, layer, x_part, y_part, ids);
        continue;
      }
      if (ids.empty()) ids = ctx.workspace.take<std::int32_t>(size(n * layer.n_active));
      const auto run =
          path == MoePath::Grouped ? secret_moe_packed_grouped : secret_moe_packed_masked;
      run(ctx, layer, x_part, y_part, ids);
      continue;
    }
    if (path == MoePath::Gather) {
      secret_moe_gather(ctx, layer, x_part, y_part, ids);
      continue;
    }
    if (ids.empty()) ids = ctx.workspace.take<std::int32_t>(size(n * layer.n_active));
    route(ctx, layer, x_part, ids);
    bias_and_bypass(ctx, layer, x_part, y_part);
    if (path == MoePath::Grouped) {
      secret_moe_grouped(ctx, layer, x_part, ids, y_part);
    } else {
      secret_moe_masked(ctx, layer, x_part, ids, y_part);
    }
  }
}

}  // namespace moesaic::kernels
