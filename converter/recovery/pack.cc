#include "converter/recovery/pack.h"

#include <algorithm>
#include <array>
#include <functional>
#include <map>

#include "converter/linalg.h"
#include "converter/recovery/moments.h"
#include "converter/recovery/pack_matrix.h"
#include "converter/recovery/pack_self_routed.h"
#include "converter/rounding.h"
#include "converter/student.h"
#include "engine/monitor.h"
#include "kernels/linear.h"
#include "kernels/quant.h"

namespace moesaic::converter {
namespace {

// Second moments of a layer's inputs and features.
struct Moments {
  AlignedBuffer<float> xx, ff;
};

template <class T>
AlignedBuffer<T> copy(const AlignedBuffer<T>& from) {
  AlignedBuffer<T> to(from.size());
  std::copy(from.begin(), from.end(), to.begin());
  return to;
}

Student to_student(const MoeLayer<Bfloat16>& layer) {
  const MoeShape& s = layer.shape();
  const MoeParameters<float>& p = layer.parameters();
  Student out;
  out.plan = {.dense = false,
              .n_shared = s.n_shared,
              .n_active = s.n_active,
              .router_rank = s.router_rank,
              .bypass_rank = s.bypass_rank};
  out.neurons.phi = s.phi;
  out.neurons.d_model = s.d_model;
  out.neurons.n = s.n_neurons();
  out.neurons.w_gate = copy(p.w_gate);
  out.neurons.w_up = copy(p.w_up);
  out.neurons.w_down = copy(p.w_down);
  out.mean = AlignedBuffer<float>(layer.mean().size());
  std::copy(layer.mean().begin(), layer.mean().end(), out.mean.begin());
  out.router_v = copy(p.router_v);
  out.router_u = copy(p.router_u);
  out.router_bias = copy(p.router_bias);
  out.bypass_q = copy(p.bypass_q);
  out.bypass_p = copy(p.bypass_p);
  out.bias = copy(p.bias);
  return out;
}

// The text that rounding goes by, spread over what was trained on.
std::vector<std::int32_t> rounding_text(const Trainer& trainer, std::int64_t n_windows) {
  std::vector<std::int32_t> tokens;
  for (std::int64_t w = 0; w < n_windows; ++w) {
    const auto ids = trainer.window(w * trainer.n_train_windows() / n_windows);
    tokens.insert(tokens.end(), ids.begin(), ids.end());
  }
  return tokens;
}

void pass(Context& ctx, Hybrid<Bfloat16>& model, std::span<const std::int32_t> tokens) {
  const Workspace::Scope scope(ctx.workspace);
  const auto n = static_cast<std::int64_t>(tokens.size());
  model.forward(tokens, take_matrix<std::uint16_t>(ctx, n, model.head().cols));
}

const models::Mlp& mlp_of(const models::Checkpoint& hybrid, const Converted<Bfloat16>& c) {
  return hybrid.layers[static_cast<std::size_t>(c.layer)].mlp;
}

void pack_secret_moes(Context& ctx, Hybrid<Bfloat16>& model, const models::Checkpoint& hybrid,
                      std::optional<DType> type, std::span<const std::int32_t> tokens,
                      std::int64_t n_windows, engine::Monitor& monitor, PackedLayers& packed) {
  std::map<std::size_t, Moments> moments;
  for (std::size_t i = 0; i < model.converted().size(); ++i) {
    const TrainedMoe<Bfloat16>* moe = model.converted()[i].moe();
    if (moe == nullptr) continue;
    const auto n = static_cast<std::size_t>(moe->layer.shape().n_neurons());
    const auto d = static_cast<std::size_t>(moe->layer.shape().d_model);
    moments[i] = {AlignedBuffer<float>(d * d), AlignedBuffer<float>(n * n)};
  }
  if (moments.empty()) return;
  model.observe_features([&](std::size_t index, MatrixView<const std::uint16_t> x,
                             MatrixView<const std::uint16_t> f, std::span<const float> weight) {
    const Workspace::Scope scope(ctx.workspace);
    const auto xw = take_weighted(ctx, x, weight, false);
    const auto fw = take_weighted(ctx, f, weight, false);
    Moments& own = moments.at(index);
    kernels::gemm(ctx, true, false, 1, xw, xw, 1, {own.xx.data(), x.cols, x.cols});
    kernels::gemm(ctx, true, false, 1, fw, fw, 1, {own.ff.data(), f.cols, f.cols});
  });
  monitor.stage("round what was trained", n_windows + static_cast<std::int64_t>(moments.size()));
  std::int64_t done = 0;
  const std::size_t window = tokens.size() / static_cast<std::size_t>(n_windows);
  for (std::int64_t w = 0; w < n_windows; ++w) {
    monitor.check();
    pass(ctx, model, tokens.subspan(static_cast<std::size_t>(w) * window, window));
    monitor.advance(++done, "");
  }
  model.observe_features({});
  for (auto& [i, own] : moments) {
    monitor.check();
    Converted<Bfloat16>& c = model.converted()[i];
    const auto& view = std::get<kernels::SecretMoeView>(mlp_of(hybrid, c));
    const MoeLayer<Bfloat16>& layer = c.moe()->layer;
    Student student = to_student(layer);
    const MoeShape& s = layer.shape();
    const DType dtype = type.value_or(view.experts.dtype);
    round_inputs_to(ctx, student, moment_factor(own.xx, s.d_model), dtype, view.router_v.dtype);
    round_outputs(ctx, {student.neurons.w_down.data(), s.n_neurons(), s.d_model},
                  moment_factor(own.ff, s.n_neurons()), dtype);
    packed[i].second = std::get<models::PackedSecretMoe>(pack(student, dtype, view.router_v.dtype));
    monitor.advance(++done, "");
  }
  for (const auto& [i, own] : moments) {
    model.replace(packed[i].first, view(packed[i].second));
  }
}

const kernels::SelfRoutedView& self_routed_of(const models::Checkpoint& hybrid,
                                              const Converted<Bfloat16>& c) {
  return std::get<kernels::SelfRoutedView>(mlp_of(hybrid, c));
}

// Matrices as a file holds them but for their scales, where the trainer has these.
PackMatrix with_scales(Context& ctx, const Trainer& trainer, int layer,
                       const kernels::SelfRoutedView& view) {
  return [&ctx, &trainer, layer, &view](std::size_t m, Matrix w, const std::function<DMatrix()>&) {
    const WeightView from = *std::array{&view.w_gate, &view.w_up, &view.w_down}[m];
    const BlockScales* scales = trainer.scales(layer, m);
    AlignedBuffer<std::byte> bytes =
        scales ? scales->packed()
               : AlignedBuffer<std::byte>(static_cast<std::size_t>(from.bytes()));
    if (!scales) std::copy_n(from.data, from.bytes(), bytes.data());
    for_each_row(ctx, w.rows, [&](std::int64_t r, int) {
      kernels::dequantize_row(from.dtype, bytes.data() + r * from.row_bytes(),
                              {w.row(r), static_cast<std::size_t>(w.cols)});
    });
    return bytes;
  };
}

// Rounds the attention of layers that learnt as a pass comes to them.
void observe_attention(Context& ctx, Hybrid<Bfloat16>& model, const models::Checkpoint& hybrid,
                       std::vector<PackedAttention>& packed) {
  for (int l = 0; l < model.n_layers(); ++l) {
    if (!model.attention(l).updates().empty()) packed.emplace_back().layer = l;
  }
  for (PackedAttention& own : packed) {
    AttentionBlock<Bfloat16>& block = model.attention(own.layer);
    block.observe([&ctx, &block, &hybrid, &own](bool output, ConstMatrix x) {
      const models::LayerWeights& layer = hybrid.layers[static_cast<std::size_t>(own.layer)];
      const std::array<const WeightView*, kAttentionMatrices> before = {&layer.w_q, &layer.w_k,
                                                                        &layer.w_v, &layer.w_o};
      const std::vector<float> ones(static_cast<std::size_t>(x.rows), 1.0F);
      const DMatrix moments = second_moments(ctx, x, ones);
      const std::size_t first = output ? kAttentionOutput : kQuery;
      const std::size_t end = output ? kAttentionMatrices : kAttentionOutput;
      for (std::size_t m = first; m < end; ++m) {
        const Workspace::Scope scope(ctx.workspace);
        const Matrix w = block.updates()[m].take_merged(ctx);
        const DType dtype = writable_type(before[m]->dtype, {}, w.cols);
        own.matrices[m] = {dtype, w.rows, w.cols, round_and_pack(ctx, w, moments, dtype)};
        block.set(ctx, static_cast<AttentionMatrix>(m), w);
      }
    });
  }
}

// The types of a self-routed layer and how its matrices are packed into them.
using HowToPack = std::function<std::pair<MatrixTypes, PackMatrix>(const Converted<Bfloat16>&)>;

void pack_self_routed_layers(Context& ctx, Hybrid<Bfloat16>& model, const HowToPack& how,
                             std::span<const std::int32_t> tokens, engine::Monitor& monitor,
                             PackedLayers& packed) {
  std::vector<std::size_t> layers;
  for (std::size_t i = 0; i < packed.size(); ++i) {
    if (model.converted()[i].self_routed() != nullptr) layers.push_back(i);
  }
  monitor.stage("round what was trained", static_cast<std::int64_t>(layers.size()));
  std::int64_t done = 0;
  model.observe_inputs([&](std::size_t index, ConstMatrix x, std::span<const float> weight) {
    monitor.check();
    Converted<Bfloat16>& c = model.converted()[index];
    const auto [types, pack] = how(c);
    packed[index].second = pack_self_routed(ctx, *c.self_routed(), types, pack, x, weight);
    model.replace(c.layer, view(packed[index].second));
    monitor.advance(++done, "");
  });
  model.forget_counts();
  pass(ctx, model, tokens);
  model.observe_inputs({});
  for (const std::size_t i : layers) {
    const TrainedSelfRouted<Bfloat16>& routed = *model.converted()[i].self_routed();
    auto& own = std::get<models::PackedSelfRouted>(packed[i].second);
    const SelfRoutedTriple shares = routed.seen.shares(routed.layer.shape());
    own.input_share = shares[kInput];
    own.gate_share = shares[kGate];
    own.hidden_share = shares[kHidden];
  }
}

}  // namespace

PackedModel pack_trained(Context& ctx, Trainer& trainer, const models::Checkpoint& hybrid,
                         std::optional<DType> type, std::int64_t n_windows,
                         engine::Monitor& monitor) {
  Hybrid<Bfloat16>& model = trainer.model();
  n_windows = std::min(n_windows, trainer.n_train_windows());
  const std::vector<std::int32_t> tokens = rounding_text(trainer, n_windows);
  PackedModel packed;
  for (const Converted<Bfloat16>& c : model.converted())
    packed.layers.emplace_back(c.layer, PackedLayer());
  pack_secret_moes(ctx, model, hybrid, type, tokens, n_windows, monitor, packed.layers);
  const auto rounding = [&](const Converted<Bfloat16>& c) {
    const MatrixTypes types = writable_types(self_routed_of(hybrid, c), type);
    return std::pair(types, by_rounding(ctx, types));
  };
  observe_attention(ctx, model, hybrid, packed.attention);
  const auto& converted = model.converted();
  const bool self_routed = std::any_of(converted.begin(), converted.end(), [](const auto& c) {
    return std::holds_alternative<TrainedSelfRouted<Bfloat16>>(c.form);
  });
  if (!self_routed && packed.attention.empty()) return packed;
  pack_self_routed_layers(ctx, model, rounding, tokens, monitor, packed.layers);
  for (const PackedAttention& own : packed.attention) model.attention(own.layer).observe({});
  return packed;
}

PackedLayers pack_scaled(Context& ctx, Trainer& trainer, const models::Checkpoint& hybrid,
                         std::int64_t n_windows, engine::Monitor& monitor) {
  Hybrid<Bfloat16>& model = trainer.model();
  n_windows = std::min(n_windows, trainer.n_train_windows());
  PackedLayers packed;
  for (const Converted<Bfloat16>& c : model.converted())
    packed.emplace_back(c.layer, PackedLayer());
  const auto scaling = [&](const Converted<Bfloat16>& c) {
    const kernels::SelfRoutedView& view = self_routed_of(hybrid, c);
    return std::pair(types_of(view), with_scales(ctx, trainer, c.layer, view));
  };
  pack_self_routed_layers(ctx, model, scaling, rounding_text(trainer, n_windows), monitor, packed);
  std::erase_if(packed, [](const auto& p) {
    return !std::holds_alternative<models::PackedSelfRouted>(p.second);
  });
  return packed;
}

}  // namespace moesaic::converter
