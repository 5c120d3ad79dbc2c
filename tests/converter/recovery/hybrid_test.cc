// Whole models: gradients in float64 against central differences, and the way forward against the
// runtime's.

#include "converter/recovery/hybrid.h"

#include <random>

#include "converter/recovery/norm.h"
#include "engine/kv_cache.h"
#include "kernels/quant.h"
#include "tests/converter/recovery/gradient_check.h"
#include "tests/converter/recovery/self_routed_model.h"
#include "tests/converter/relative_difference.h"
#include "tests/models/tiny_model.h"

namespace moesaic::converter {
namespace {

using models::TinyModel;
using models::TinyOptions;

struct HybridCase {
  const char* name;
  TinyOptions model;
  bool recompute;
  std::vector<int> self_routed = {};
  bool up_by_input = false;

  TinyModel make() const {
    return TinyModel(model, self_routed.empty() ? std::function<void(TinyModel&)>()
                                                : self_route(self_routed, up_by_input,
                                                             model.n_layers, model.moe_layers));
  }
  std::size_t n_converted() const { return model.moe_layers.size() + self_routed.size(); }
};

void PrintTo(const HybridCase& c, std::ostream* out) { *out << c.name; }

class RecoveryHybrid : public testing::TestWithParam<HybridCase> {};

constexpr std::int64_t kContext = 8;

TEST_P(RecoveryHybrid, GradientsOfTheDivergence) {
  const TinyModel file = GetParam().make();
  const auto checkpoint = file.load();
  Lent lent;
  Hybrid<Float64> model(*checkpoint, lent.ctx, kContext, GetParam().recompute);
  ASSERT_EQ(model.converted().size(), GetParam().n_converted());
  const auto tokens = models::random_ids(2 * kContext);
  const auto n = static_cast<std::int64_t>(tokens.size());
  RandomMatrix teacher(n, TinyModel::kModel, 5);
  // Not used by the neurons' gradient; here it would only move the routers.
  for (auto& c : model.converted()) {
    if (auto* moe = c.moe()) moe->router.auxiliary = 0;
  }
  const auto losses = model.gradients(tokens, teacher.view(), n);
  const auto loss = [&] {
    model.refresh();
    return model.divergence(tokens, teacher.view()) / static_cast<double>(n);
  };
  EXPECT_NEAR(losses.kl / static_cast<double>(n), loss(), 1e-12);
  for (auto& c : model.converted()) {
    for (const TrainedTensor<double>& t : c.tensors()) {
      if (t.router) continue;
      SCOPED_TRACE(testing::Message() << "layer " << c.layer << " " << t.name);
      expect_gradient(t.value, t.gradient, loss, "parameters", 6, 1e-6);
    }
  }
}

// Updates of the attention begin at nothing, and their gradients are those of differences.
TEST_P(RecoveryHybrid, GradientsOfTheAttentionsUpdates) {
  const TinyModel file = GetParam().make();
  const auto checkpoint = file.load();
  Lent lent;
  Hybrid<Float64> model(*checkpoint, lent.ctx, kContext, GetParam().recompute);
  const auto tokens = models::random_ids(2 * kContext);
  const auto n = static_cast<std::int64_t>(tokens.size());
  RandomMatrix teacher(n, TinyModel::kModel, 5);
  for (auto& c : model.converted()) {
    if (auto* moe = c.moe()) moe->router.auxiliary = 0;
  }
  const auto loss = [&] {
    model.refresh();
    return model.divergence(tokens, teacher.view()) / static_cast<double>(n);
  };
  const double before = loss();
  model.learn_attention(3, 11);
  EXPECT_EQ(loss(), before);
  std::mt19937_64 rng(4);
  std::normal_distribution<double> normal(0, 0.2);
  std::size_t n_updates = 0;
  for (int l = 0; l < model.n_layers(); ++l) {
    for (LowRankUpdate<Float64>& update : model.attention(l).updates()) {
      for (double& v : update.b()) v = normal(rng);
      ++n_updates;
    }
  }
  EXPECT_EQ(n_updates,
            static_cast<std::size_t>(4 * (model.n_layers() - 1 - model.first_converted())));
  const double moved = loss();
  model.gradients(tokens, teacher.view(), n);
  EXPECT_EQ(moved != before, n_updates > 0);
  for (int l = 0; l < model.n_layers(); ++l) {
    std::size_t m = 0;
    for (LowRankUpdate<Float64>& update : model.attention(l).updates()) {
      SCOPED_TRACE(testing::Message() << "layer " << l << " " << kAttentionNames[m++]);
      expect_gradient(update.a(), update.a_gradient(), loss, "A", 6, 1e-6);
      expect_gradient(update.b(), update.b_gradient(), loss, "B", 6, 1e-6);
    }
  }
}

// Parts of a step add up to the step.
TEST_P(RecoveryHybrid, GradientsAccumulate) {
  const TinyModel file = GetParam().make();
  const auto checkpoint = file.load();
  Lent lent;
  Hybrid<Float64> model(*checkpoint, lent.ctx, kContext, GetParam().recompute);
  const auto tokens = models::random_ids(2 * kContext);
  RandomMatrix teacher(2 * kContext, TinyModel::kModel, 5);
  const auto whole = model.gradients(tokens, teacher.view(), 2 * kContext);
  std::vector<std::vector<double>> expected;
  for (auto& c : model.converted()) {
    for (const TrainedTensor<double>& t : c.tensors()) {
      expected.emplace_back(t.gradient.begin(), t.gradient.end());
      std::fill(t.gradient.begin(), t.gradient.end(), 0.0);
    }
  }
  double kl = 0;
  for (const std::int64_t first : {std::int64_t{0}, kContext}) {
    kl += model
              .gradients(std::span(tokens).subspan(static_cast<std::size_t>(first), kContext),
                         std::as_const(teacher).view().slice(first, kContext), 2 * kContext)
              .kl;
  }
  EXPECT_NEAR(kl, whole.kl, 1e-10);
  std::size_t tensor = 0;
  for (auto& c : model.converted()) {
    for (const TrainedTensor<double>& t : c.tensors()) {
      const std::vector<double>& own = expected[tensor++];
      // The routers' ω are scaled within each part.
      if (t.router) continue;
      for (std::size_t j = 0; j < t.gradient.size(); ++j) {
        ASSERT_NEAR(t.gradient[j], own[j], 1e-12);
      }
    }
  }
}

// Final normed hidden states of the runtime for windows of kContext tokens.
std::vector<float> runtime_hidden(const std::shared_ptr<const models::Checkpoint>& checkpoint,
                                  std::span<const std::int32_t> tokens, Context& ctx) {
  models::Transformer model(checkpoint, ctx);
  const std::int64_t d = model.config().d_model;
  std::vector<float> out;
  for (std::size_t first = 0; first < tokens.size(); first += kContext) {
    engine::HostKvCache cache(model.config().n_layers, 1, kContext, model.config().n_kv_heads,
                              model.config().head_dim);
    std::vector<std::int32_t> slots(kContext), positions(kContext);
    for (std::size_t i = 0; i < positions.size(); ++i) {
      positions[i] = static_cast<std::int32_t>(i);
    }
    std::vector<float> r(static_cast<std::size_t>(kContext * d));
    model.run_layers({tokens.subspan(first, kContext), slots, positions, positions}, cache,
                     {r.data(), kContext, d});
    norm_forward<float>(ctx, {r.data(), kContext, d}, checkpoint->output_norm,
                        checkpoint->config.norm_eps, {r.data(), kContext, d});
    out.insert(out.end(), r.begin(), r.end());
  }
  return out;
}

TEST_P(RecoveryHybrid, ForwardInFloat32EqualsTheRuntime) {
  const TinyModel file = GetParam().make();
  const auto checkpoint = file.load();
  Lent lent;
  const auto tokens = models::random_ids(3 * kContext);
  const std::vector<float> expected = runtime_hidden(checkpoint, tokens, lent.ctx);
  Hybrid<Float32> model(*checkpoint, lent.ctx, kContext, GetParam().recompute);
  std::vector<float> found(expected.size());
  model.forward(tokens, {found.data(), 3 * kContext, TinyModel::kModel});
  EXPECT_LT(relative_difference(found, expected), 1e-4);
}

// bfloat16 carries 8 bits: 2⁻⁹ per rounding, two dozen roundings deep. Near ties of the router may
// fall the other way, so the selection is the exact one's only almost always.
TEST_P(RecoveryHybrid, ForwardInBfloat16IsNear) {
  const TinyModel file = GetParam().make();
  const auto checkpoint = file.load();
  Lent lent;
  const auto tokens = models::random_ids(3 * kContext);
  const std::vector<float> expected = runtime_hidden(checkpoint, tokens, lent.ctx);
  Hybrid<Bfloat16> model(*checkpoint, lent.ctx, kContext, GetParam().recompute);
  std::vector<std::uint16_t> bits(expected.size());
  model.forward(tokens, {bits.data(), 3 * kContext, TinyModel::kModel});
  std::vector<float> found(expected.size());
  for (std::size_t i = 0; i < bits.size(); ++i) found[i] = kernels::bf16_to_f32(bits[i]);
  EXPECT_LT(relative_difference(found, expected), 0.06);
}

// The training precision's gradient points the way of the exact one. An expert that is chosen or
// left by a rounding is a seventh of a token's experts, and there are 24 tokens.
TEST_P(RecoveryHybrid, GradientInBfloat16IsNearFloat32) {
  const TinyModel file = GetParam().make();
  const auto checkpoint = file.load();
  Lent lent;
  const auto tokens = models::random_ids(3 * kContext);
  const std::int64_t n = 3 * kContext;
  Hybrid<Float32> exact(*checkpoint, lent.ctx, kContext, GetParam().recompute);
  Hybrid<Bfloat16> model(*checkpoint, lent.ctx, kContext, GetParam().recompute);
  const std::vector<float> teacher =
      runtime_hidden(checkpoint, models::random_ids(24, 9), lent.ctx);
  std::vector<std::uint16_t> bits(teacher.size());
  to_operand(teacher.data(), static_cast<std::int64_t>(teacher.size()), bits.data());
  exact.gradients(tokens, {teacher.data(), n, TinyModel::kModel}, n);
  model.gradients(tokens, {bits.data(), n, TinyModel::kModel}, n);
  for (std::size_t l = 0; l < exact.converted().size(); ++l) {
    const auto a = exact.converted()[l].tensors();
    const auto b = model.converted()[l].tensors();
    for (std::size_t i = 0; i < a.size(); ++i) {
      double ab = 0, aa = 0, bb = 0;
      for (std::size_t j = 0; j < a[i].gradient.size(); ++j) {
        ab += a[i].gradient[j] * b[i].gradient[j];
        aa += a[i].gradient[j] * a[i].gradient[j];
        bb += b[i].gradient[j] * b[i].gradient[j];
      }
      EXPECT_GT(ab / std::sqrt(aa * bb), 0.9) << "layer " << l << " tensor " << i;
    }
  }
}

// Of the runtime's tally of what its thresholds left.
TEST_P(RecoveryHybrid, ActiveFractionIsTheRuntimes) {
  const TinyModel file = GetParam().make();
  const auto checkpoint = file.load();
  Lent lent;
  const auto tokens = models::random_ids(3 * kContext);
  Hybrid<Float32> model(*checkpoint, lent.ctx, kContext, GetParam().recompute);
  std::vector<float> h(static_cast<std::size_t>(3 * kContext * TinyModel::kModel));
  double expected = 0;
  for (std::size_t l = 0; l < checkpoint->layers.size(); ++l) {
    if (!std::holds_alternative<kernels::SelfRoutedView>(checkpoint->layers[l].mlp)) {
      expected += static_cast<double>(models::multiply_adds(checkpoint->layers[l].mlp));
    }
  }
  model.observe_inputs([&](std::size_t index, ConstMatrix x, std::span<const float>) {
    const auto layer = static_cast<std::size_t>(model.converted()[index].layer);
    std::vector<float> y(static_cast<std::size_t>(x.rows * x.cols));
    expected += static_cast<double>(models::mlp_forward(lent.ctx, checkpoint->layers[layer].mlp,
                                                        {x}, {y.data(), x.rows, x.cols})) /
                static_cast<double>(x.rows);
  });
  model.forward(tokens, {h.data(), 3 * kContext, TinyModel::kModel});
  const double dense = 3.0 * TinyModel::kModel * TinyModel::kFf;
  EXPECT_NEAR(model.active_fraction(),
              expected / dense / static_cast<double>(checkpoint->layers.size()), 1e-9);
}

INSTANTIATE_TEST_SUITE_P(
    Models, RecoveryHybrid,
    testing::Values(
        HybridCase{"Llama", {.n_layers = 3, .moe_layers = {1, 2}}, false},
        HybridCase{"LlamaDenseBetween", {.n_layers = 3, .tied = false, .moe_layers = {0, 2}}, true},
        HybridCase{"Gemma",
                   {.architecture = "gemma3", .n_layers = 3, .window = 4, .moe_layers = {1, 2}},
                   false},
        HybridCase{"GemmaRecomputed",
                   {.architecture = "gemma3", .n_layers = 2, .window = 4, .moe_layers = {0, 1}},
                   true},
        HybridCase{"LlamaSelfRouted", {.n_layers = 3}, false, {1, 2}},
        HybridCase{"LlamaSelfRoutedByInput", {.n_layers = 2}, true, {0, 1}, true},
        HybridCase{"LlamaBothForms", {.n_layers = 3, .moe_layers = {0}}, false, {2}},
        HybridCase{"GemmaSelfRouted",
                   {.architecture = "gemma3", .n_layers = 2, .window = 4},
                   true,
                   {0, 1}}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace moesaic::converter
