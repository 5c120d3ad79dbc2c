#include "models/cuda/transformer.h"
#include "tests/models/cuda/runner.h"

// Batches of more than 64 rows, which go through tensor cores.

namespace moesaic::models {
namespace {

constexpr double kBf16 =
    0x1p-8;  // spacing of bfloat16 below 1; an operand's rounding is half of it

struct Case {
  TinyOptions options;
  std::vector<std::string> kinds;  // of its layers, where they are self-routed or mixed
  std::string name;
};

class CudaPrompt : public cuda::OnDevice, public testing::WithParamInterface<Case> {
 protected:
  TinyModel model() const {
    TinyOptions options = GetParam().options;
    const auto& kinds = GetParam().kinds;
    if (kinds.empty()) return TinyModel(options);
    options.n_layers = static_cast<int>(kinds.size());
    return TinyModel(options, [&](TinyModel& m) { add_self_routed(m, kinds, 0.1F, 0.4F); });
  }
};

// Root mean square of the differences over that of the expected logits.
double rms_error(const Rows& found, const Rows& expected) {
  EXPECT_EQ(found.size(), expected.size());
  double differences = 0, squares = 0;
  for (std::size_t t = 0; t < std::min(found.size(), expected.size()); ++t) {
    for (std::size_t i = 0; i < expected[t].size(); ++i) {
      differences += std::pow(found[t][i] - expected[t][i], 2);
      squares += std::pow(expected[t][i], 2);
    }
  }
  return std::sqrt(differences / squares);
}

TEST_P(CudaPrompt, GreedyTokensEqualTheCpus) {
  const TinyModel tiny = model();
  TestContext test;
  Transformer cpu(tiny.load(), test.context);
  CudaTransformer gpu(tiny.load(), 0);
  const auto prompt = random_ids(83);
  EXPECT_EQ(greedy(gpu, prompt, 20), greedy(cpu, prompt, 20));
}

// A layer's products round their operands by a 256th at most, at random: two layers or so of them
// stay within a few such roundings. Routed layers change experts where scores are that close.
TEST_P(CudaPrompt, LogitsEqualTheCpusWithinBfloat16) {
  const TinyModel tiny = model();
  TestContext test;
  Transformer cpu(tiny.load(), test.context);
  CudaTransformer gpu(tiny.load(), 0);
  const auto ids = random_ids(100);
  const Rows expected = Runner(cpu, 1, 100).run_pieces(ids, 100);
  const bool routed = !GetParam().kinds.empty() || !GetParam().options.moe_layers.empty();
  for (const std::size_t n : {100, 81}) {  // 81: a piece through tensor cores, one in float32
    const double error = rms_error(Runner(gpu, 1, 100).run_pieces(ids, n), expected);
    EXPECT_LT(error, (routed ? 8 : 3) * kBf16) << n;
    EXPECT_GT(error, 0.01 * kBf16) << "not through bfloat16";
  }
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, CudaPrompt,
    testing::Values(
        Case{{.architecture = "llama", .dtype = DType::Q8_0}, {}, "Llama"},
        Case{{.architecture = "llama", .dtype = DType::BF16, .window = 50, .tied = false},
             {},
             "LlamaWindowUntiedBF16"},
        Case{{.architecture = "gemma3", .n_layers = 6, .window = 8}, {}, "GemmaWindow"},
        Case{{.architecture = "llama", .dtype = DType::Q4_1, .moe_layers = {1}}, {}, "Hybrid"},
        Case{{.architecture = "gemma3", .moe_layers = {0, 1}}, {}, "GemmaHybrid"},
        Case{{}, {"glu+gate", "glu+gate"}, "Gate"},
        Case{{.dtype = DType::Q4_1}, {"glu+input", "glu+input"}, "InputQ4_1"},
        Case{{.architecture = "gemma3", .dtype = DType::Q8_0, .window = 8},
             {"glu+gate", "dense", "glu+input"},
             "GemmaSelfRoutedQ8_0"},
        Case{{.dtype = DType::Q5_0}, {"glu+gate", "glu+input"}, "NoColumnsQ5_0"},
        Case{{.dtype = DType::Q4_1, .moe_layers = {1}},
             {"glu+gate", "glu+low_rank", "glu+input", "dense"},
             "EveryKind"}),
    [](const auto& instance) { return instance.param.name; });

class CudaPrompts : public cuda::OnDevice {};

TEST_F(CudaPrompts, SequencesInOneBatchDoNotMix) {
  const TinyModel tiny({.window = 20});
  CudaTransformer gpu(tiny.load(), 0);
  const auto a = random_ids(60, 5), b = random_ids(45, 6);
  Runner apart(gpu), together(gpu);
  const Rows expected_a = apart.run_pieces(a, 60, 0), expected_b = apart.run_pieces(b, 45, 2);
  // Row by row from one and the other, then what is left of the longer.
  std::vector<std::int32_t> tokens, slots, positions, outputs;
  Rows expected;
  for (std::size_t t = 0; t < a.size(); ++t) {
    for (const bool first : {true, false}) {
      if (!first && t >= b.size()) continue;
      tokens.push_back((first ? a : b)[t]);
      slots.push_back(first ? 0 : 2);
      positions.push_back(static_cast<std::int32_t>(t));
      outputs.push_back(static_cast<std::int32_t>(outputs.size()));
      expected.push_back((first ? expected_a : expected_b)[t]);
    }
  }
  EXPECT_LT(rms_error(together.run(tokens, slots, positions, outputs), expected), 3 * kBf16);
}

TEST_F(CudaPrompts, OutputsPickTheirRows) {
  const TinyModel tiny({});
  CudaTransformer gpu(tiny.load(), 0);
  const auto ids = random_ids(90);
  std::vector<std::int32_t> positions(90);
  for (std::size_t t = 0; t < 90; ++t) positions[t] = static_cast<std::int32_t>(t);
  Runner runner(gpu, 1, 90);
  const std::vector<std::int32_t> slots(90, 0);
  const Rows all = runner.run_pieces(ids, 90);
  const Rows some = runner.run(ids, slots, positions, {0, 40, 89});
  EXPECT_LT(rms_error(some, {all[0], all[40], all[89]}), kBf16);  // with a float32 head
  EXPECT_TRUE(runner.run(ids, slots, positions, {}).empty());
}

}  // namespace
}  // namespace moesaic::models
