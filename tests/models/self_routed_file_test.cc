#include "models/self_routed_file.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/base/error.h"
#include "models/panels.h"
#include "tests/models/gguf_bytes.h"
#include "tests/models/tiny_self_routed.h"

namespace moesaic::models {
namespace {

using testing::contains;
using testing::error_of;

constexpr int kLayers = 3;  // dense, glu+gate, glu+input

/// Layer 1 self-routed by the gate and layer 2 by the input, thresholds all `threshold`.
void add_self_routed(TinyModel& m, float threshold) {
  add_self_routed(m, {"dense", "glu+gate", "glu+input"}, threshold, threshold);
}

std::string error(const std::function<void(TinyModel&)>& spoil) {
  const TinyModel model({.n_layers = kLayers}, [&](TinyModel& m) {
    add_self_routed(m, 0.1F);
    spoil(m);
  });
  return error_of<FormatError>([&] { model.load(); });
}

TEST(SelfRoutedFile, LayersAreRead) {
  const TinyModel model({.n_layers = kLayers}, [](TinyModel& m) { add_self_routed(m, 0.25F); });
  const auto checkpoint = model.load();
  EXPECT_TRUE(std::holds_alternative<DenseMlp>(checkpoint->layers[0].mlp));
  const auto& gate = std::get<kernels::SelfRoutedView>(checkpoint->layers[1].mlp);
  const auto& input = std::get<kernels::SelfRoutedView>(checkpoint->layers[2].mlp);
  EXPECT_FALSE(gate.up_by_input);
  EXPECT_TRUE(input.up_by_input);
  EXPECT_EQ(gate.input_threshold.size(), TinyModel::kModel);
  EXPECT_EQ(gate.gate_threshold.size(), TinyModel::kFf);
  EXPECT_EQ(gate.hidden_threshold.size(), TinyModel::kFf);
  EXPECT_TRUE(input.gate_threshold.empty());
  EXPECT_EQ(gate.gate_threshold[3], 0.25F);
  EXPECT_EQ(input.input_share, 0.25F);
  EXPECT_EQ(input.hidden_share, 0.125F);
  constexpr auto kMatrix = TinyModel::kModel * TinyModel::kFf;
  EXPECT_EQ(multiply_adds(checkpoint->layers[1].mlp), 3 * kMatrix / 2);
  EXPECT_EQ(multiply_adds(checkpoint->layers[2].mlp), kMatrix / 2 + kMatrix / 8);
}

// With thresholds of 0 the model is the dense one; with infinite ones its self-routed layers add
// nothing.
TEST(SelfRoutedFile, ForwardEqualsReference) {
  for (const float threshold : {0.0F, std::numeric_limits<float>::infinity()}) {
    TinyModel model({.n_layers = kLayers}, [&](TinyModel& m) { add_self_routed(m, threshold); });
    if (threshold > 0) {
      for (int l : {1, 2}) {
        auto& w = model.reference.layers[static_cast<std::size_t>(l)].w_down;
        std::fill(w.begin(), w.end(), 0.0);
      }
    }
    const std::vector<std::int32_t> ids = random_ids(7);
    const auto expected = model.reference.logits(ids);
    for (const Activations activations : {Activations::F32, Activations::Q16}) {
      TestContext test(2, activations);
      Transformer transformer(with_panels(*model.load(), test.pool), test.context);
      const engine::DecoderShape shape = transformer.shape();
      engine::HostKvCache cache(shape.n_layers, 1, 16, shape.n_kv_heads, shape.head_dim);
      std::vector<float> logits(static_cast<std::size_t>(shape.vocab_size));
      for (std::int32_t p = 0; p < 7; ++p) {
        const std::int32_t id = ids[static_cast<std::size_t>(p)], slot = 0, output = 0;
        transformer.forward({{&id, 1}, {&slot, 1}, {&p, 1}, {&output, 1}}, cache,
                            Matrix(logits.data(), 1, shape.vocab_size));
        for (std::size_t v = 0; v < logits.size(); ++v) {
          ASSERT_NEAR(logits[v], expected[static_cast<std::size_t>(p)][v], 2e-4) << "token " << p;
        }
      }
      EXPECT_NEAR(test.tally.active_fraction(), threshold > 0 ? 1.0 / 3 : 1.0, 1e-12);
    }
  }
}

TEST(SelfRoutedFile, DamageIsNamed) {
  for (const char* part :
       {"blk.1.moe.input_threshold", "blk.1.moe.gate_threshold", "blk.2.moe.hidden_threshold"}) {
    const std::string name = part;
    EXPECT_PRED2(contains, error([&](TinyModel& m) { m.erase_tensor(name); }), name);
    EXPECT_PRED2(contains, error([&](TinyModel& m) {
                   m.tensor(name).dims = {32};
                   m.tensor(name).data.resize(32 * sizeof(float));
                 }),
                 name);
    EXPECT_PRED2(contains, error([&](TinyModel& m) { set_floats(m, name, std::nanf("")); }), name);
    EXPECT_PRED2(contains, error([&](TinyModel& m) { set_floats(m, name, -1.0F); }), name);
    EXPECT_PRED2(contains, error([&](TinyModel& m) {
                   TinyModel::Tensor& t = m.tensor(name);
                   t.dtype = DType::F16;
                   t.data.resize(t.data.size() / 2);
                 }),
                 name);
  }
}

TEST(SelfRoutedFile, DamagedSharesAreNamed) {
  for (const std::string key :
       {"moesaic.layer.input_share", "moesaic.layer.gate_share", "moesaic.layer.hidden_share"}) {
    EXPECT_PRED2(contains, error([&](TinyModel& m) { m.erase_key(key); }), key);
    EXPECT_PRED2(contains, error([&](TinyModel& m) {
                   m.set(key, GgufValue::f32_array({1, 1}));
                 }),
                 key);
    EXPECT_PRED2(contains, error([&](TinyModel& m) {
                   m.set(key, GgufValue::f32_array({1, 1.5F, 1}));
                 }),
                 key);
  }
}

TEST(SelfRoutedFile, UnknownKindIsNamed) {
  EXPECT_PRED2(contains, error([](TinyModel& m) {
                 m.set("moesaic.layer.kind", GgufValue::string_array({"dense", "glu+x", "dense"}));
               }),
               "glu+x");
}

}  // namespace
}  // namespace moesaic::models
