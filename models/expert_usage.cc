#include "models/expert_usage.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <optional>
#include <utility>

#include "engine/kv_cache.h"
#include "kernels/base/aligned_buffer.h"
#include "kernels/base/error.h"
#include "kernels/quant.h"
#include "models/mixture_expert.h"

namespace moesaic::models {
namespace {

Matrix take(Workspace& workspace, std::int64_t rows, std::int64_t cols) {
  return {workspace.take<float>(static_cast<std::size_t>(rows * cols)).data(), rows, cols};
}

// What a layer did with one window: its MLP's input x [n, d_model], and where there is a router the
// ids that were selected [n, n_selected()].
using LayerVisitor = std::function<void(int layer, std::int64_t first_token, ConstMatrix x,
                                        std::span<const std::int32_t> selected)>;

void visit_layers(Transformer& model, std::span<const std::int32_t> tokens, std::int64_t n_ctx,
                  engine::Monitor& monitor, const LayerVisitor& visit) {
  const ModelConfig& config = model.config();
  require<InputError>(!tokens.empty(), "no tokens to run, expected at least one");
  require<InputError>(n_ctx >= 1 && n_ctx <= config.context_length,
                      "n_ctx: {} given, expected 1 to {}, the model's context length", n_ctx,
                      config.context_length);
  Workspace& workspace = model.context().workspace;
  engine::HostKvCache cache(config.n_layers, 1, n_ctx, config.n_kv_heads, config.head_dim);
  const std::vector<std::int32_t> slots(static_cast<std::size_t>(n_ctx), 0);
  std::vector<std::int32_t> positions(slots.size());
  std::iota(positions.begin(), positions.end(), 0);
  const auto n_tokens = static_cast<std::int64_t>(tokens.size());
  monitor.stage("run the text", n_tokens);
  for (std::int64_t first = 0; first < n_tokens; first += n_ctx) {
    const std::int64_t n = std::min(n_ctx, n_tokens - first);
    const auto size = static_cast<std::size_t>(n);
    const Workspace::Scope of_window(workspace);
    const Matrix r = take(workspace, n, config.d_model);
    model.embed(tokens.subspan(static_cast<std::size_t>(first), size), r);
    for (int layer = 0; layer < config.n_layers; ++layer) {
      monitor.check();
      const Workspace::Scope of_layer(workspace);
      model.attention_block(layer, {std::span(slots).first(size), std::span(positions).first(size)},
                            cache.layer(layer), r);
      const Mlp& mlp = model.checkpoint().layers[static_cast<std::size_t>(layer)].mlp;
      const Matrix x = take(workspace, n, config.d_model);
      const Matrix y = take(workspace, n, config.d_model);
      const std::span<std::int32_t> selected =
          workspace.take<std::int32_t>(static_cast<std::size_t>(n * n_selected(mlp)));
      model.mlp_input(layer, r, x);
      mlp_forward(model.context(), mlp, {.x = x}, y, selected);
      visit(layer, first, x, selected);
      model.add_mlp_output(layer, y, r);
    }
    monitor.advance(first + n, {});
  }
}

// h [n, d_ff]: the activations of a self-routed layer by its definition, and which were kept.
struct RoutedActivations {
  Matrix h;
  std::vector<bool> kept;  // [n, d_ff]
};

RoutedActivations routed_activations(Context& ctx, const kernels::SelfRoutedView& layer,
                                     ConstMatrix x) {
  const std::int64_t d_ff = layer.d_ff();
  const Matrix large = take(ctx.workspace, x.rows, x.cols);
  for (std::int64_t t = 0; t < x.rows; ++t) {
    for (std::int64_t j = 0; j < x.cols; ++j) {
      const float v = x.row(t)[j];
      const bool in = std::abs(v) >= layer.input_threshold[static_cast<std::size_t>(j)];
      large.row(t)[j] = in ? v : 0;
    }
  }
  const Matrix g = take(ctx.workspace, x.rows, d_ff);
  const Matrix u = take(ctx.workspace, x.rows, d_ff);
  kernels::linear(ctx, layer.w_gate, large, g, Traffic::Mlp);
  kernels::linear(ctx, layer.w_up, layer.up_by_input ? ConstMatrix(large) : x, u, Traffic::Mlp);
  RoutedActivations result{u, std::vector<bool>(static_cast<std::size_t>(x.rows * d_ff))};
  for (std::int64_t t = 0; t < x.rows; ++t) {
    for (std::int64_t i = 0; i < d_ff; ++i) {
      const auto id = static_cast<std::size_t>(i);
      const float a = kernels::activate(layer.phi, g.row(t)[i]);
      const bool routed = layer.up_by_input || std::abs(a) >= layer.gate_threshold[id];
      u.row(t)[i] *= a;
      result.kept[static_cast<std::size_t>(t * d_ff + i)] =
          routed && std::abs(u.row(t)[i]) >= layer.hidden_threshold[id];
    }
  }
  return result;
}

// The strongest firings of one expert, seen one after the other.
class Strongest {
 public:
  explicit Strongest(std::size_t n) : n_(n) {}

  void add(Firing firing) {
    if (n_ == 0) return;
    if (firings_.size() == n_) {
      if (!before(firing, firings_.front())) return;
      std::pop_heap(firings_.begin(), firings_.end(), before);
      firings_.pop_back();
    }
    firings_.push_back(firing);
    std::push_heap(firings_.begin(), firings_.end(), before);
  }
  std::vector<Firing> sorted() && {
    std::sort_heap(firings_.begin(), firings_.end(), before);
    return std::move(firings_);
  }

 private:
  static bool before(const Firing& a, const Firing& b) {
    return a.contribution != b.contribution ? a.contribution > b.contribution : a.place < b.place;
  }
  std::size_t n_;
  std::vector<Firing> firings_;  // a heap, the weakest in front
};

double norm(std::span<const float> v) {
  double squares = 0;
  for (const float x : v) squares += double{x} * x;
  return std::sqrt(squares);
}

// One wanted expert with the rows of its neuron, where they stand together.
struct Wanted {
  ExpertId id;
  std::vector<float> gate, up;  // [d_model], of a secret MoE
  double mean = 0;              // μ
  double down_norm = 0;         // ‖w_down‖
  Strongest strongest;
  std::optional<MixtureExpert> of_mixture = {};

  double contribution(kernels::Activation phi, const float* x) const {
    const double g = std::inner_product(gate.begin(), gate.end(), x, 0.0);
    const double u = std::inner_product(up.begin(), up.end(), x, 0.0);
    return std::abs(kernels::activate(phi, static_cast<float>(g)) * u - mean) * down_norm;
  }
};

Wanted wanted_expert(const Checkpoint& checkpoint, ExpertId id, std::size_t n) {
  const auto n_layers = static_cast<int>(checkpoint.layers.size());
  require<InputError>(id.layer >= 0 && id.layer < n_layers,
                      "expert {}:{}: no such layer, expected 0 to {}", id.layer, id.expert,
                      n_layers - 1);
  const Mlp& mlp = checkpoint.layers[static_cast<std::size_t>(id.layer)].mlp;
  const std::int64_t known = n_experts(mlp);
  require<InputError>(known > 0, "expert {}:{}: layer {} is dense", id.layer, id.expert, id.layer);
  require<InputError>(id.expert >= 0 && id.expert < known,
                      "expert {}:{}: layer {} has experts 0 to {}", id.layer, id.expert, id.layer,
                      known - 1);
  Wanted wanted{.id = id, .gate = {}, .up = {}, .strongest = Strongest(n)};
  std::vector<float> row(static_cast<std::size_t>(checkpoint.config.d_model));
  if (const auto* moe = std::get_if<kernels::SecretMoeView>(&mlp)) {
    const auto unpack = [&](std::int64_t r) {
      kernels::dequantize_row(moe->experts.dtype, moe->experts.row(3 * id.expert + r), row);
      return row;
    };
    wanted.gate = unpack(0);
    wanted.up = unpack(1);
    wanted.down_norm = norm(unpack(2));
    wanted.mean = moe->expert_mean[static_cast<std::size_t>(id.expert)];
    return wanted;
  }
  if (const auto* mixture = std::get_if<kernels::MixtureView>(&mlp)) {
    wanted.of_mixture.emplace(*mixture, id.expert);
    return wanted;
  }
  const WeightView& w_down = std::get<kernels::SelfRoutedView>(mlp).w_down;
  std::vector<float> whole(static_cast<std::size_t>(w_down.cols));
  for (std::int64_t r = 0; r < w_down.rows; ++r) {
    kernels::dequantize_row(w_down.dtype, w_down.row(r), whole);
    row[static_cast<std::size_t>(r)] = whole[static_cast<std::size_t>(id.expert)];
  }
  wanted.down_norm = norm(row);
  return wanted;
}

// The layer once more, for its gates.
void add_mixture_firings(Context& ctx, const kernels::MixtureView& layer, int index,
                         std::int64_t first, ConstMatrix x, std::vector<Wanted>& wanted) {
  const auto k = static_cast<std::size_t>(layer.n_active);
  const auto n_selected = static_cast<std::size_t>(x.rows) * k;
  const auto ids = ctx.workspace.take<std::int32_t>(n_selected);
  const auto gates = ctx.workspace.take<float>(n_selected);
  kernels::mixture(ctx, layer, x, take(ctx.workspace, x.rows, x.cols), ids, gates);
  for (Wanted& w : wanted) {
    if (w.id.layer != index) continue;
    for (std::size_t i = 0; i < n_selected; ++i) {
      if (ids[i] != w.id.expert) continue;
      const auto t = static_cast<std::int64_t>(i / k);
      w.strongest.add({first + t, std::abs(gates[i]) * w.of_mixture->length(x.row(t))});
    }
  }
}

}  // namespace

std::int64_t n_experts(const Mlp& mlp) {
  if (const auto* moe = std::get_if<kernels::SecretMoeView>(&mlp)) return moe->n_experts();
  if (const auto* mixture = std::get_if<kernels::MixtureView>(&mlp)) return mixture->n_experts();
  const auto* routed = std::get_if<kernels::SelfRoutedView>(&mlp);
  return routed != nullptr ? routed->d_ff() : 0;
}

ExpertUsage count_experts(Transformer& model, std::span<const std::int32_t> tokens,
                          std::int64_t n_ctx, engine::Monitor& monitor) {
  ExpertUsage usage{.n_tokens = static_cast<std::int64_t>(tokens.size()), .counts = {}};
  for (const LayerWeights& layer : model.checkpoint().layers) {
    usage.counts.emplace_back(static_cast<std::size_t>(n_experts(layer.mlp)));
  }
  visit_layers(model, tokens, n_ctx, monitor,
               [&](int layer, std::int64_t, ConstMatrix x, std::span<const std::int32_t> selected) {
                 std::vector<std::int64_t>& count = usage.counts[static_cast<std::size_t>(layer)];
                 for (const std::int32_t id : selected) ++count[static_cast<std::size_t>(id)];
                 const Mlp& mlp = model.checkpoint().layers[static_cast<std::size_t>(layer)].mlp;
                 if (const auto* routed = std::get_if<kernels::SelfRoutedView>(&mlp)) {
                   const Workspace::Scope scope(model.context().workspace);
                   const auto kept = routed_activations(model.context(), *routed, x).kept;
                   for (std::size_t i = 0; i < kept.size(); ++i) {
                     count[i % count.size()] += kept[i] ? 1 : 0;
                   }
                 }
               });
  return usage;
}

std::vector<std::vector<Firing>> strongest_firings(Transformer& model,
                                                   std::span<const std::int32_t> tokens,
                                                   std::int64_t n_ctx,
                                                   std::span<const ExpertId> experts, std::size_t n,
                                                   engine::Monitor& monitor) {
  std::vector<Wanted> wanted;
  for (const ExpertId& id : experts) wanted.push_back(wanted_expert(model.checkpoint(), id, n));
  visit_layers(
      model, tokens, n_ctx, monitor,
      [&](int layer, std::int64_t first, ConstMatrix x, std::span<const std::int32_t> selected) {
        const bool here = std::any_of(wanted.begin(), wanted.end(),
                                      [&](const Wanted& w) { return w.id.layer == layer; });
        if (!here) return;
        const Mlp& mlp = model.checkpoint().layers[static_cast<std::size_t>(layer)].mlp;
        if (const auto* moe = std::get_if<kernels::SecretMoeView>(&mlp)) {
          for (Wanted& w : wanted) {
            if (w.id.layer != layer) continue;
            for (std::int64_t t = 0; t < x.rows; ++t) {
              const auto ids = selected.subspan(static_cast<std::size_t>(t * moe->n_active),
                                                static_cast<std::size_t>(moe->n_active));
              if (std::binary_search(ids.begin(), ids.end(), w.id.expert)) {
                w.strongest.add({first + t, w.contribution(moe->phi, x.row(t))});
              }
            }
          }
          return;
        }
        const Workspace::Scope scope(model.context().workspace);
        if (const auto* mixture = std::get_if<kernels::MixtureView>(&mlp)) {
          add_mixture_firings(model.context(), *mixture, layer, first, x, wanted);
          return;
        }
        const auto& routed = std::get<kernels::SelfRoutedView>(mlp);
        const RoutedActivations found = routed_activations(model.context(), routed, x);
        for (Wanted& w : wanted) {
          if (w.id.layer != layer) continue;
          for (std::int64_t t = 0; t < x.rows; ++t) {
            if (!found.kept[static_cast<std::size_t>(t * routed.d_ff() + w.id.expert)]) continue;
            w.strongest.add({first + t, std::abs(found.h.row(t)[w.id.expert]) * w.down_norm});
          }
        }
      });
  std::vector<std::vector<Firing>> firings;
  for (Wanted& w : wanted) firings.push_back(std::move(w.strongest).sorted());
  return firings;
}

}  // namespace moesaic::models
