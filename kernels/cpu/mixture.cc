#include "kernels/mixture.h"

#include <algorithm>
#include <cmath>

#include "kernels/base/error.h"
#include "kernels/cpu/matvec.h"
#include "kernels/cpu/mixture_neurons.h"
#include "kernels/cpu/part_shapes.h"
#include "kernels/cpu/target.h"
#include "kernels/exponential.h"
#include "kernels/linear.h"
#include "kernels/product_top_k.h"
#include "kernels/top_k.h"

namespace moesaic::kernels {
namespace {

constexpr std::int64_t kChunk = 512;  // tokens that are routed together: bounds the scratch

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

constexpr PartShapes kParts = {"mixture"};

void check_router(const MixtureView& layer) {
  const std::int64_t d_model = layer.d_model();
  const std::int64_t n_experts = layer.n_experts();
  const std::int64_t rank = layer.router_rank();
  std::int64_t n_scores = n_experts;
  switch (layer.kind.router) {
    case RouterKind::LowRank:
      kParts.weight("router V", layer.router_v, rank, d_model);
      break;
    case RouterKind::FullRank:
      require<ShapeError>(layer.router_v.rows == 0,
                          "mixture: router V has {} rows, expected none at full rank",
                          layer.router_v.rows);
      require<ShapeError>(n_experts == 0 || rank == d_model,
                          "mixture: router U has rows of {}, expected {} at full rank", rank,
                          d_model);
      break;
    case RouterKind::ProductKey: {
      const std::int64_t m = std::llround(std::sqrt(static_cast<double>(n_experts)));
      require<ShapeError>(m * m == n_experts,
                          "mixture: {} experts behind product keys, expected a square", n_experts);
      n_scores = 2 * m;
      kParts.weight("router V", layer.router_v, 2 * rank, d_model);
      break;
    }
  }
  kParts.weight("router U", layer.router_u, n_scores, rank);
  kParts.length("router bias", layer.router_bias.size(), n_scores);
}

// Y = X Wᵀ, threads splitting the rows of W: what one (row, token) pair gets depends on nothing
// else, so that a batch selects what its tokens select alone.
void project(Context& ctx, const WeightView& w, ConstMatrix x, Matrix y) {
  ctx.pool.run([&](int thread) {
    const Range rows = split(w.rows, ctx.pool.n_threads(), thread);
    if (rows.size() > 0) matvec_rows(w, rows, x, y);
  });
  ctx.tally.add(Traffic::Router, w.bytes());
}

Matrix take(Context& ctx, std::int64_t rows, std::int64_t cols) {
  return {ctx.workspace.take<float>(size(rows * cols)).data(), rows, cols};
}

// Columns [first, first + n) of all rows.
Matrix columns(Matrix m, std::int64_t first, std::int64_t n) {
  return {m.data + first, m.rows, n, m.stride};
}

// Scores of the n_experts, or of the keys of both halves.   [n_tokens, router_u.rows]
void score(Context& ctx, const MixtureView& layer, ConstMatrix x, Matrix scores) {
  const Workspace::Scope scope(ctx.workspace);
  const std::int64_t rank = layer.router_rank();
  if (layer.kind.router == RouterKind::FullRank) {
    project(ctx, layer.router_u, x, scores);
  } else {
    const Matrix z = take(ctx, x.rows, layer.router_v.rows);
    project(ctx, layer.router_v, x, z);
    if (ctx.activations == Activations::BF16) {
      const std::span<float> all(z.data, size(z.rows * z.cols));
      round_to_bf16(all, all);
    }
    if (layer.kind.router == RouterKind::LowRank) {
      project(ctx, layer.router_u, z, scores);
    } else {
      const std::int64_t m = layer.router_u.rows / 2;
      for (const std::int64_t half : {0, 1}) {
        project(ctx, layer.router_u.slice(half * m, m), columns(z, half * rank, rank),
                columns(scores, half * m, m));
      }
    }
  }
  for (std::int64_t t = 0; t < scores.rows; ++t) {
    for (std::int64_t e = 0; e < scores.cols; ++e) {
      scores.row(t)[e] += layer.router_bias[size(e)];
    }
  }
}

// The gates of one token's selection from its scores.
void gate_of(const MixtureView& layer, const float* scores, std::span<const std::int32_t> ids,
             std::span<float> gate) {
  const std::int64_t m = layer.router_u.rows / 2;
  for (std::size_t j = 0; j < ids.size(); ++j) {
    gate[j] = layer.kind.router == RouterKind::ProductKey
                  ? scores[ids[j] / m] + scores[m + ids[j] % m]
                  : scores[ids[j]];
  }
  if (layer.kind.gate == GateKind::Score || gate.empty()) return;
  const float sum = exponentials(gate, *std::max_element(gate.begin(), gate.end()), gate);
  for (float& g : gate) g /= sum;
}

// ids [n_tokens, k] and, with a gate, gate [n_tokens, k].
void route(Context& ctx, const MixtureView& layer, ConstMatrix x, std::span<std::int32_t> ids,
           std::span<float> gate) {
  const std::int64_t k = layer.n_active;
  const Workspace::Scope scope(ctx.workspace);
  const Matrix scores = take(ctx, x.rows, layer.router_u.rows);
  score(ctx, layer, x, scores);
  const bool product = layer.kind.router == RouterKind::ProductKey;
  const std::size_t n = size(product ? scores.cols / 2 : scores.cols);
  const std::size_t n_candidates = product ? n_product_candidates(n, size(k)) : 0;
  const std::size_t n_ranks = product ? 2 * std::min(n, size(k)) : 0;
  const auto threads = static_cast<std::size_t>(ctx.pool.n_threads());
  const auto keys = ctx.workspace.take<std::uint32_t>(threads * n);
  const auto candidates = ctx.workspace.take<ProductCandidate>(threads * n_candidates);
  const auto values = ctx.workspace.take<float>(product ? threads * 2 * n : 0);
  const auto ranks = ctx.workspace.take<std::int32_t>(threads * n_ranks);
  ctx.pool.run([&](int thread) {
    const auto own = static_cast<std::size_t>(thread);
    const auto own_keys = keys.subspan(own * n, n);
    const Range tokens = split(x.rows, ctx.pool.n_threads(), thread);
    for (std::int64_t t = tokens.begin; t < tokens.end; ++t) {
      const std::span<std::int32_t> chosen = ids.subspan(size(t * k), size(k));
      const float* row = scores.row(t);
      if (product) {
        top_k_product(
            {row, n}, {row + n, n}, chosen,
            {candidates.subspan(own * n_candidates, n_candidates),
             values.subspan(own * 2 * n, 2 * n), own_keys, ranks.subspan(own * n_ranks, n_ranks)});
      } else {
        top_k({row, n}, chosen, own_keys);
      }
      if (!gate.empty()) gate_of(layer, row, chosen, gate.subspan(size(t * k), size(k)));
    }
  });
}

// y += shared and selected neurons.
void add_neurons(Context& ctx, const MixtureView& layer, ConstMatrix x,
                 std::span<const std::int32_t> ids, std::span<const float> gate, Matrix y) {
  const std::int64_t k = layer.n_active;
  const std::int64_t d_model = layer.d_model();
  const int n_threads = ctx.pool.n_threads();
  const MixtureNeurons shared{.kind = layer.kind.expert,
                              .phi = layer.phi,
                              .rows = layer.shared,
                              .bias = layer.shared_bias.data()};
  const auto routed = [&](std::int64_t t) {
    return MixtureNeurons{.kind = layer.kind.expert,
                          .phi = layer.phi,
                          .block = layer.block,
                          .rows = layer.experts,
                          .bias = layer.expert_bias.data(),
                          .mean = layer.expert_mean.data(),
                          .ids = ids.data() + t * k,
                          .gate = gate.empty() ? nullptr : gate.data() + t * k};
  };
  const std::int64_t n_routed = k * layer.block;
  ctx.tally.add(Traffic::Experts,
                x.rows * (layer.shared.bytes() + n_routed * rows_per_neuron(layer.kind.expert) *
                                                     layer.experts.row_bytes()));
  if (x.rows >= n_threads) {
    ctx.pool.run([&](int thread) {
      const Range tokens = split(x.rows, n_threads, thread);
      for (std::int64_t t = tokens.begin; t < tokens.end; ++t) {
        add_mixture_neurons(ctx, shared, {0, layer.n_shared()}, x.row(t), y.row(t));
        add_mixture_neurons(ctx, routed(t), {0, n_routed}, x.row(t), y.row(t));
      }
    });
    return;
  }
  // Fewer tokens than threads: all threads share each token's neurons.
  const Workspace::Scope scope(ctx.workspace);
  const Matrix sums = take(ctx, n_threads, d_model);
  for (std::int64_t t = 0; t < x.rows; ++t) {
    ctx.pool.run([&](int thread) {
      float* sum = sums.row(thread);
      std::fill_n(sum, d_model, 0.0f);
      add_mixture_neurons(ctx, shared, split(layer.n_shared(), n_threads, thread), x.row(t), sum);
      add_mixture_neurons(ctx, routed(t), split(n_routed, n_threads, n_threads - 1 - thread),
                          x.row(t), sum);
    });
    for (std::int64_t i = 0; i < n_threads; ++i) {
      for (std::int64_t j = 0; j < d_model; ++j) y.row(t)[j] += sums.row(i)[j];
    }
  }
}

void mixture_chunk(Context& ctx, const MixtureView& layer, ConstMatrix x, Matrix y,
                   std::span<std::int32_t> ids, std::span<float> gates) {
  const Workspace::Scope scope(ctx.workspace);
  const std::size_t n_selected = size(x.rows * layer.n_active);
  if (ctx.activations == Activations::BF16) {
    const Matrix rounded = take(ctx, x.rows, x.cols);
    for (std::int64_t t = 0; t < x.rows; ++t) {
      round_to_bf16({x.row(t), size(x.cols)}, {rounded.row(t), size(x.cols)});
    }
    x = rounded;
  }
  if (ids.empty()) ids = ctx.workspace.take<std::int32_t>(n_selected);
  std::span<float> gate;  // empty: all 1
  if (layer.kind.gate == GateKind::None) {
    std::fill(gates.begin(), gates.end(), 1.0f);
  } else {
    gate = gates.empty() ? ctx.workspace.take<float>(n_selected) : gates;
  }
  if (layer.n_experts() > 0) route(ctx, layer, x, ids, gate);
  for (std::int64_t t = 0; t < y.rows; ++t) {
    std::copy(layer.bias.begin(), layer.bias.end(), y.row(t));
  }
  if (!layer.bypass_p.empty()) {
    const Matrix z = take(ctx, x.rows, layer.bypass_rank());
    linear(ctx, layer.bypass_q, x, z, Traffic::Router);
    linear(ctx, layer.bypass_p, z, y, Traffic::Router, true);
  }
  add_neurons(ctx, layer, x, ids, gate, y);
}

}  // namespace

std::int64_t rows_per_neuron(ExpertKind kind) { return kind == ExpertKind::Glu ? 3 : 2; }

void check_shapes(const MixtureView& layer) {
  const std::int64_t d_model = layer.d_model();
  const std::int64_t c = rows_per_neuron(layer.kind.expert);
  require<ShapeError>(d_model > 0, "mixture: bias is empty, expected d_model elements");
  require<ShapeError>(layer.block >= 1, "mixture: blocks of {} neurons, expected at least 1",
                      layer.block);
  require<ShapeError>(layer.shared.rows % c == 0,
                      "mixture: shared has {} rows, expected {} a neuron", layer.shared.rows, c);
  require<ShapeError>(layer.experts.rows % (c * layer.block) == 0,
                      "mixture: experts has {} rows, expected {} an expert", layer.experts.rows,
                      c * layer.block);
  if (layer.n_shared() > 0) kParts.weight("shared", layer.shared, layer.shared.rows, d_model);
  const std::int64_t n_experts = layer.n_experts();
  require<ShapeError>(layer.n_active >= 0 && layer.n_active <= n_experts,
                      "mixture: n_active is {}, expected 0 to {}", layer.n_active, n_experts);
  if (n_experts > 0) {
    kParts.weight("experts", layer.experts, layer.experts.rows, d_model);
    check_router(layer);
  } else {
    require<ShapeError>(layer.router_v.rows == 0 && layer.router_u.rows == 0,
                        "mixture: router has {} and {} rows, expected none without experts",
                        layer.router_v.rows, layer.router_u.rows);
    kParts.length("router bias", layer.router_bias.size(), 0);
  }
  const bool biased = layer.kind.expert == ExpertKind::Gelu;
  kParts.length("shared bias", layer.shared_bias.size(), biased ? layer.n_shared() : 0);
  kParts.length("expert bias", layer.expert_bias.size(), biased ? n_experts * layer.block : 0);
  if (!layer.expert_mean.empty()) {
    kParts.length("mean", layer.expert_mean.size(), n_experts * layer.block);
  }
  if (!layer.bypass_q.empty() || !layer.bypass_p.empty()) {
    kParts.weight("bypass Q", layer.bypass_q, layer.bypass_rank(), d_model);
    kParts.weight("bypass P", layer.bypass_p, d_model, layer.bypass_rank());
  }
}

std::int64_t multiply_adds(const MixtureView& layer) {
  const std::int64_t d_model = layer.d_model();
  const std::int64_t routed = layer.n_active * layer.block;
  const std::int64_t neurons = layer.n_shared() + routed;
  return layer.router_v.rows * layer.router_v.cols + layer.router_u.rows * layer.router_u.cols +
         2 * layer.bypass_rank() * d_model +
         rows_per_neuron(layer.kind.expert) * d_model * neurons +
         (layer.kind.gate == GateKind::None ? 0 : routed);
}

void mixture(Context& ctx, const MixtureView& layer, ConstMatrix x, Matrix y,
             std::span<std::int32_t> selected, std::span<float> gates) {
  check_shapes(layer);
  require<ShapeError>(x.cols == layer.d_model() && y.cols == x.cols && y.rows == x.rows,
                      "mixture: x is [{}, {}], y is [{}, {}], expected both [{}, {}]", x.rows,
                      x.cols, y.rows, y.cols, x.rows, layer.d_model());
  for (const std::size_t room : {selected.size(), gates.size()}) {
    require<ShapeError>(room == 0 || room == size(x.rows * layer.n_active),
                        "mixture: room for {} selected ids or gates, expected {}", room,
                        x.rows * layer.n_active);
  }
  obey_target_environment();
  for (std::int64_t first = 0; first < x.rows; first += kChunk) {
    const std::int64_t n = std::min(kChunk, x.rows - first);
    const auto part = [&](auto all) {
      return all.empty() ? all
                         : all.subspan(size(first * layer.n_active), size(n * layer.n_active));
    };
    mixture_chunk(ctx, layer, x.slice(first, n), y.slice(first, n), part(selected), part(gates));
  }
}

}  // namespace moesaic::kernels
