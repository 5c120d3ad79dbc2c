#include "models/expert_usage.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "kernels/base/error.h"
#include "models/self_routed_file.h"
#include "tests/models/tiny_model.h"

namespace moesaic::models {
namespace {

constexpr auto kD = static_cast<std::size_t>(TinyModel::kModel);
constexpr auto kFf = static_cast<std::size_t>(TinyModel::kFf);

double silu(double x) { return x / (1 + std::exp(-x)); }

double dot(const double* a, const float* b, std::size_t n) {
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// MLP inputs of every layer, [n_layers][n_tokens · d_model]: whole windows, layer by layer.
std::vector<std::vector<float>> mlp_inputs(Transformer& model, const std::vector<std::int32_t>& ids,
                                           std::size_t n_ctx) {
  std::vector<std::vector<float>> inputs(model.checkpoint().layers.size());
  for (std::size_t first = 0; first < ids.size(); first += n_ctx) {
    const std::size_t n = std::min(n_ctx, ids.size() - first);
    const auto rows = static_cast<std::int64_t>(n);
    std::vector<float> r(n * kD), x(n * kD), y(n * kD);
    const auto matrix = [&](std::vector<float>& v) { return Matrix(v.data(), rows, kD); };
    engine::HostKvCache cache(model.config().n_layers, 1, rows, TinyModel::kKvHeads, 16);
    std::vector<std::int32_t> slots(n, 0), positions(n);
    for (std::size_t i = 0; i < n; ++i) positions[i] = static_cast<std::int32_t>(i);
    model.embed(std::span(ids).subspan(first, n), matrix(r));
    for (int l = 0; l < model.config().n_layers; ++l) {
      model.attention_block(l, {slots, positions}, cache.layer(l), matrix(r));
      model.mlp_input(l, matrix(r), matrix(x));
      inputs[static_cast<std::size_t>(l)].insert(inputs[static_cast<std::size_t>(l)].end(),
                                                 x.begin(), x.end());
      mlp_forward(model.context(), model.checkpoint().layers[static_cast<std::size_t>(l)].mlp,
                  {.x = matrix(x)}, matrix(y));
      model.add_mlp_output(l, matrix(y), matrix(r));
    }
  }
  return inputs;
}

// What the definition says of one layer: per expert the tokens that fired it, and how strongly.
using Fired = std::map<std::int64_t, std::vector<Firing>>;

Fired fired_experts(const reference::Decoder& model, std::size_t layer,
                    const std::vector<float>& x) {
  Fired fired;
  const reference::Decoder::Moe& moe = *model.layers[layer].moe;
  for (std::size_t t = 0; t < x.size() / kD; ++t) {
    std::vector<std::int32_t> selected;
    const auto begin = x.begin() + static_cast<std::ptrdiff_t>(t * kD);
    model.mlp(model.layers[layer], {begin, begin + kD}, &selected);
    for (const std::int32_t id : selected) {
      const double* rows = &moe.experts[3 * kD * static_cast<std::size_t>(id)];
      const double f = silu(dot(rows, &x[t * kD], kD)) * dot(rows + kD, &x[t * kD], kD) -
                       moe.mean[static_cast<std::size_t>(id)];
      double squares = 0;
      for (std::size_t i = 0; i < kD; ++i) squares += rows[2 * kD + i] * rows[2 * kD + i];
      fired[id].push_back({static_cast<std::int64_t>(t), std::abs(f) * std::sqrt(squares)});
    }
  }
  return fired;
}

void expect_firings(const std::vector<Firing>& found, std::vector<Firing> expected, std::size_t n) {
  std::stable_sort(expected.begin(), expected.end(), [](const Firing& a, const Firing& b) {
    return a.contribution > b.contribution;
  });
  ASSERT_EQ(found.size(), std::min(n, expected.size()));
  for (std::size_t i = 0; i < found.size(); ++i) {
    EXPECT_EQ(found[i].place, expected[i].place) << i;
    EXPECT_NEAR(found[i].contribution, expected[i].contribution,
                1e-4 * (1 + expected[i].contribution));
  }
}

TEST(ExpertUsage, EqualsTheLoops) {
  const TinyModel tiny({.n_layers = 3, .moe_layers = {0, 2}});
  TestContext test;
  Transformer model(tiny.load(), test.context);
  engine::Monitor monitor;
  const auto ids = random_ids(50);
  const auto inputs = mlp_inputs(model, ids, 16);
  const ExpertUsage usage = count_experts(model, ids, 16, monitor);
  EXPECT_EQ(usage.n_tokens, 50);
  ASSERT_EQ(usage.counts.size(), 3U);
  EXPECT_TRUE(usage.counts[1].empty());
  for (const std::size_t l : {0U, 2U}) {
    const Fired fired = fired_experts(tiny.reference, l, inputs[l]);
    ASSERT_EQ(usage.counts[l].size(), static_cast<std::size_t>(TinyModel::kExperts));
    std::int64_t sum = 0;
    std::vector<ExpertId> experts;
    for (std::int64_t e = 0; e < TinyModel::kExperts; ++e) {
      const auto it = fired.find(e);
      const auto expected = it == fired.end() ? 0 : it->second.size();
      EXPECT_EQ(usage.counts[l][static_cast<std::size_t>(e)], static_cast<std::int64_t>(expected));
      sum += usage.counts[l][static_cast<std::size_t>(e)];
      experts.push_back({static_cast<int>(l), e});
    }
    EXPECT_EQ(sum, 50 * TinyModel::kActive);
    const auto firings = strongest_firings(model, ids, 16, experts, 5, monitor);
    ASSERT_EQ(firings.size(), experts.size());
    for (const ExpertId& id : experts) {
      const auto it = fired.find(id.expert);
      expect_firings(firings[static_cast<std::size_t>(id.expert)],
                     it == fired.end() ? std::vector<Firing>{} : it->second, 5);
    }
  }
}

TEST(ExpertUsage, OfASelfRoutedLayerEqualsTheLoops) {
  for (const bool by_input : {false, true}) {
    const TinyModel tiny({}, [&](TinyModel& m) {
      const std::string kind(by_input ? kKindGluInput : kKindGluGate);
      m.set("moesaic.format_version", GgufValue::u32(1));
      m.set("moesaic.layer.kind", GgufValue::string_array({"dense", kind}));
      m.set("moesaic.layer.n_active", GgufValue::u32_array({0, 0}));
      for (const std::string_view key : {kKeyInputShare, kKeyGateShare, kKeyHiddenShare}) {
        m.set(std::string(key), GgufValue::f32_array({1, 0.5}));
      }
      const auto add = [&](std::string_view name, std::int64_t n, double around) {
        m.add("blk.1." + std::string(name), DType::F32, {n}, 0.1 * around, around);
      };
      add(kInputThreshold, TinyModel::kModel, 0.4);
      if (!by_input) add(kGateThreshold, TinyModel::kFf, 0.1);
      add(kHiddenThreshold, TinyModel::kFf, 0.3);
    });
    TestContext test;
    Transformer model(tiny.load(), test.context);
    engine::Monitor monitor;
    const auto ids = random_ids(40);
    const std::vector<float> x = mlp_inputs(model, ids, 16)[1];
    const auto& view = std::get<kernels::SelfRoutedView>(model.checkpoint().layers[1].mlp);
    const reference::Decoder::Layer& layer = tiny.reference.layers[1];
    Fired fired;
    for (std::size_t t = 0; t < ids.size(); ++t) {
      std::vector<float> large(kD);
      for (std::size_t j = 0; j < kD; ++j) {
        const float v = x[t * kD + j];
        large[j] = std::abs(v) >= view.input_threshold[j] ? v : 0;
      }
      for (std::size_t i = 0; i < kFf; ++i) {
        const double a = silu(dot(&layer.w_gate[i * kD], large.data(), kD));
        const double u = dot(&layer.w_up[i * kD], by_input ? large.data() : &x[t * kD], kD);
        if (!by_input && std::abs(a) < view.gate_threshold[i]) continue;
        if (std::abs(a * u) < view.hidden_threshold[i]) continue;
        double squares = 0;
        for (std::size_t r = 0; r < kD; ++r) {
          squares += layer.w_down[r * kFf + i] * layer.w_down[r * kFf + i];
        }
        fired[static_cast<std::int64_t>(i)].push_back(
            {static_cast<std::int64_t>(t), std::abs(a * u) * std::sqrt(squares)});
      }
    }
    const ExpertUsage usage = count_experts(model, ids, 16, monitor);
    EXPECT_TRUE(usage.counts[0].empty());
    ASSERT_EQ(usage.counts[1].size(), kFf);
    std::int64_t n_firings = 0;
    for (std::size_t i = 0; i < kFf; ++i) {
      const std::vector<Firing>& expected = fired[static_cast<std::int64_t>(i)];
      EXPECT_EQ(usage.counts[1][i], static_cast<std::int64_t>(expected.size())) << i;
      n_firings += usage.counts[1][i];
      const ExpertId id{1, static_cast<std::int64_t>(i)};
      expect_firings(strongest_firings(model, ids, 16, {&id, 1}, 3, monitor)[0], expected, 3);
    }
    // Neither none nor all: the thresholds do something.
    EXPECT_GT(n_firings, 0);
    EXPECT_LT(n_firings, static_cast<std::int64_t>(ids.size() * kFf));
  }
}

TEST(ExpertUsage, WindowsAreSequencesOfTheirOwn) {
  const TinyModel tiny({.moe_layers = {0, 1}});
  TestContext test;
  Transformer model(tiny.load(), test.context);
  engine::Monitor monitor;
  auto ids = random_ids(8);
  const ExpertUsage once = count_experts(model, ids, 8, monitor);
  const std::vector<std::int32_t> again = ids;
  ids.insert(ids.end(), again.begin(), again.end());
  const ExpertUsage twice = count_experts(model, ids, 8, monitor);
  for (std::size_t l = 0; l < 2; ++l) {
    for (std::size_t e = 0; e < once.counts[l].size(); ++e) {
      EXPECT_EQ(twice.counts[l][e], 2 * once.counts[l][e]);
    }
  }
}

TEST(ExpertUsage, EqualContributionsKeepTheOrderOfTheText) {
  const TinyModel tiny({.moe_layers = {0}});
  TestContext test;
  Transformer model(tiny.load(), test.context);
  engine::Monitor monitor;
  const std::vector<std::int32_t> ids(6, 5);  // windows of one token: all alike
  const ExpertUsage usage = count_experts(model, ids, 1, monitor);
  const auto fired = std::find(usage.counts[0].begin(), usage.counts[0].end(), 6);
  ASSERT_NE(fired, usage.counts[0].end());
  const ExpertId id{0, fired - usage.counts[0].begin()};
  const auto firings = strongest_firings(model, ids, 1, {&id, 1}, 4, monitor)[0];
  ASSERT_EQ(firings.size(), 4U);
  for (std::int64_t i = 0; i < 4; ++i) EXPECT_EQ(firings[static_cast<std::size_t>(i)].place, i);
  EXPECT_TRUE(strongest_firings(model, ids, 1, {&id, 1}, 0, monitor)[0].empty());
}

TEST(ExpertUsage, WhatDoesNotExistIsRefused) {
  const TinyModel tiny({.moe_layers = {1}});
  TestContext test;
  Transformer model(tiny.load(), test.context);
  engine::Monitor monitor;
  const auto ids = random_ids(4);
  const auto refuses = [&](ExpertId id) {
    EXPECT_THROW(strongest_firings(model, ids, 4, {&id, 1}, 1, monitor), InputError)
        << id.layer << ":" << id.expert;
  };
  refuses({-1, 0});
  refuses({2, 0});
  refuses({0, 0});  // dense
  refuses({1, -1});
  refuses({1, TinyModel::kExperts});
  EXPECT_THROW(count_experts(model, {}, 4, monitor), InputError);
  EXPECT_THROW(count_experts(model, ids, 0, monitor), InputError);
  EXPECT_THROW(count_experts(model, ids, 257, monitor), InputError);
}

}  // namespace
}  // namespace moesaic::models
