#include "models/config.h"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/base/error.h"
#include "tests/models/tiny_model.h"

namespace moesaic::models {
namespace {

ModelConfig config_of(const TinyModel& model) { return read_config(*GgufFile::open(model.path)); }

TEST(Config, LlamaByItsKeys) {
  const TinyModel model({.n_layers = 3});
  const ModelConfig config = config_of(model);
  EXPECT_EQ(config.architecture, "llama");
  EXPECT_EQ(config.name, "tiny");
  EXPECT_EQ(config.n_layers, 3);
  EXPECT_EQ(config.d_model, 64);
  EXPECT_EQ(config.d_ff, 96);
  EXPECT_EQ(config.n_heads, 4);
  EXPECT_EQ(config.n_kv_heads, 2);
  EXPECT_EQ(config.head_dim, 16);
  EXPECT_EQ(config.vocab_size, 80);
  EXPECT_EQ(config.context_length, 256);
  EXPECT_FLOAT_EQ(config.attention_scale, 0.25F);
  EXPECT_EQ(config.embedding_scale, 1.0F);
  EXPECT_EQ(config.phi, kernels::Activation::Silu);
  EXPECT_EQ(config.rope_style, kernels::RopeStyle::Interleaved);
  EXPECT_FALSE(config.qk_norm);
  EXPECT_FALSE(config.post_norms);
  ASSERT_EQ(config.layers.size(), 3U);
  EXPECT_EQ(config.layers[0].rope_base, 5e4);
  EXPECT_EQ(config.layers[0].window, 0);
  const engine::DecoderShape shape = config.shape();
  EXPECT_EQ(shape.n_layers, 3);
  EXPECT_EQ(shape.n_kv_heads, 2);
  EXPECT_EQ(shape.head_dim, 16);
  EXPECT_EQ(shape.vocab_size, 80);
  EXPECT_EQ(shape.context_length, 256);
}

TEST(Config, GemmaHasOneGlobalLayerInSix) {
  const TinyModel model({.architecture = "gemma3", .n_layers = 13, .window = 8});
  const ModelConfig config = config_of(model);
  EXPECT_EQ(config.head_dim, 32);
  EXPECT_EQ(config.embedding_scale, 8.0F);
  EXPECT_EQ(config.phi, kernels::Activation::GeluTanh);
  EXPECT_EQ(config.rope_style, kernels::RopeStyle::Halves);
  EXPECT_TRUE(config.qk_norm);
  EXPECT_TRUE(config.post_norms);
  for (std::size_t i = 0; i < 13; ++i) {
    const bool global = i == 5 || i == 11;
    EXPECT_EQ(config.layers[i].window, global ? 0 : 8) << i;
    EXPECT_EQ(config.layers[i].rope_base, global ? 1e6 : 1e4) << i;
  }
}

// What the file with a change is refused for.
void expect_refused(const std::string& architecture, const std::function<void(TinyModel&)>& change,
                    const std::vector<std::string>& words) {
  const TinyModel model({.architecture = architecture, .n_layers = 1}, change);
  try {
    config_of(model);
    FAIL() << "accepted, expected an error about " << words[0];
  } catch (const FormatError& e) {
    const std::string text = e.what();
    EXPECT_NE(text.find(model.path.string()), std::string::npos) << text;
    EXPECT_EQ(text.find('\n'), std::string::npos) << text;
    for (const std::string& word : words) EXPECT_NE(text.find(word), std::string::npos) << text;
  }
}

TEST(Config, UnknownArchitectureListsTheKnown) {
  expect_refused("mamba", {}, {"mamba", "llama", "gemma3"});
}

TEST(Config, MissingKeyIsNamed) {
  for (const char* key : {"llama.block_count", "llama.embedding_length",
                          "llama.feed_forward_length", "llama.attention.head_count",
                          "llama.context_length", "llama.attention.layer_norm_rms_epsilon"}) {
    expect_refused("llama", [&](TinyModel& m) { m.erase_key(key); }, {key});
  }
}

TEST(Config, ValuesOutOfRangeAreRefused) {
  const auto refuse = [](const std::string& key, const GgufValue& value) {
    expect_refused("llama", [&](TinyModel& m) { m.set(key, value); }, {key});
  };
  refuse("llama.block_count", GgufValue::u32(0));
  refuse("llama.block_count", GgufValue::u32(4000000000U));
  refuse("llama.embedding_length", GgufValue::u64(std::uint64_t{1} << 60));
  refuse("llama.attention.head_count", GgufValue::u32(0));
  refuse("llama.attention.head_count_kv", GgufValue::u32(5));
  refuse("llama.attention.layer_norm_rms_epsilon", GgufValue::f32(0));
  refuse("llama.attention.layer_norm_rms_epsilon", GgufValue::f32(NAN));
  refuse("llama.rope.freq_base", GgufValue::f32(-1));
  refuse("llama.block_count", GgufValue::string("two"));
}

TEST(Config, HeadsMustFitTogether) {
  expect_refused("llama",
                 [](TinyModel& m) { m.set("llama.attention.head_count_kv", GgufValue::u32(3)); },
                 {"4", "3"});
  expect_refused("llama",
                 [](TinyModel& m) { m.set("llama.rope.dimension_count", GgufValue::u32(8)); },
                 {"rope.dimension_count", "8", "16"});
  expect_refused("gemma3",
                 [](TinyModel& m) { m.set("gemma3.attention.value_length", GgufValue::u32(16)); },
                 {"attention.value_length", "16", "32"});
}

TEST(Config, VocabularyMustFitTheEmbedding) {
  expect_refused("llama",
                 [](TinyModel& m) {
                   m.set("tokenizer.ggml.tokens", GgufValue::string_array({"a", "b"}));
                 },
                 {"token_embd.weight", "80", "2"});
  expect_refused("llama", [](TinyModel& m) { m.set("llama.vocab_size", GgufValue::u32(79)); },
                 {"llama.vocab_size", "79", "80"});
  expect_refused("llama", [](TinyModel& m) { m.erase_tensor("token_embd.weight"); },
                 {"token_embd.weight"});
}

TEST(Config, FeaturesThatWouldComputeSomethingElseAreRefused) {
  const auto refuse = [](const std::string& key, const GgufValue& value) {
    expect_refused("llama", [&](TinyModel& m) { m.set(key, value); }, {key, "support"});
  };
  refuse("llama.rope.scaling.type", GgufValue::string("yarn"));
  refuse("llama.rope.scaling.factor", GgufValue::f32(8));
  refuse("llama.rope.scale_linear", GgufValue::f32(2));
  refuse("llama.expert_count", GgufValue::u32(8));
  refuse("llama.attn_logit_softcapping", GgufValue::f32(50));
  refuse("llama.final_logit_softcapping", GgufValue::f32(30));
}

TEST(Config, FeaturesThatAreOffAreAccepted) {
  const TinyModel model({}, [](TinyModel& m) {
    m.set("llama.rope.scaling.type", GgufValue::string("linear"));
    m.set("llama.rope.scaling.factor", GgufValue::f32(1));
    m.set("llama.expert_count", GgufValue::u32(0));
    m.set("llama.final_logit_softcapping", GgufValue::f32(0));
  });
  EXPECT_NO_THROW(config_of(model));
}

}  // namespace
}  // namespace moesaic::models
