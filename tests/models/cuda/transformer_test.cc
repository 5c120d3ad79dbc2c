#include "models/cuda/transformer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "engine/generation.h"
#include "kernels/base/error.h"
#include "tests/models/cuda/runner.h"
#include "tests/models/tiny_mixture.h"
#include "tests/models/tiny_self_routed.h"

namespace moesaic::models {
namespace {

// As for the CPU's transformer: sums of about a hundred terms, through layers that renorm.
constexpr double kTolerance = 300 * 1.2e-7;

struct Case {
  TinyOptions options;
  std::string name;
};

class CudaTransformerOn : public cuda::OnDevice, public ::testing::WithParamInterface<Case> {};

TEST_P(CudaTransformerOn, GreedyTokensEqualTheCpus) {
  const TinyModel tiny(GetParam().options);
  TestContext test;
  Transformer cpu(tiny.load(), test.context);
  CudaTransformer gpu(tiny.load(), 0);
  const auto prompt = random_ids(9);
  EXPECT_EQ(greedy(gpu, prompt, 64), greedy(cpu, prompt, 64));
}

TEST_P(CudaTransformerOn, PrefillAndPiecesEqualTheLoops) {
  const TinyModel tiny(GetParam().options);
  CudaTransformer gpu(tiny.load(), 0);
  const auto ids = random_ids(20);
  const auto expected = tiny.reference.logits(ids);
  for (const std::size_t n : {20, 7, 1}) {
    Runner runner(gpu);
    EXPECT_LT(relative_error(runner.run_pieces(ids, n), expected), kTolerance) << n;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, CudaTransformerOn,
    ::testing::Values(
        Case{{.architecture = "llama"}, "Llama"},
        Case{{.architecture = "llama", .dtype = DType::Q8_0, .tied = false}, "LlamaUntiedQ8_0"},
        Case{{.architecture = "llama", .dtype = DType::BF16, .window = 5}, "LlamaWindowBF16"},
        Case{{.architecture = "llama", .dtype = DType::Q4_1, .moe_layers = {0, 1}},
             "LlamaHybridQ4_1"},
        Case{{.architecture = "gemma3", .n_layers = 7, .window = 8}, "GemmaWindow"},
        Case{{.architecture = "gemma3", .window = 8, .moe_layers = {0}}, "GemmaHybrid"}),
    [](const auto& instance) { return instance.param.name; });

struct SelfRoutedCase {
  TinyOptions options;
  std::vector<std::string> kinds;
  std::string name;
};

// Self-routed layers, beside the other kinds too, whose workspaces they must not share.
class CudaSelfRouted : public cuda::OnDevice, public ::testing::WithParamInterface<SelfRoutedCase> {
 protected:
  TinyModel model() const {
    TinyOptions options = GetParam().options;
    options.n_layers = static_cast<int>(GetParam().kinds.size());
    return TinyModel(options,
                     [](TinyModel& m) { add_self_routed(m, GetParam().kinds, 0.1F, 0.4F); });
  }
};

TEST_P(CudaSelfRouted, GreedyTokensEqualTheCpus) {
  const TinyModel tiny = model();
  TestContext test;
  Transformer cpu(tiny.load(), test.context);
  CudaTransformer gpu(tiny.load(), 0);
  const auto prompt = random_ids(9);
  EXPECT_EQ(greedy(gpu, prompt, 64), greedy(cpu, prompt, 64));
  EXPECT_LT(test.tally.active_fraction(), 0.8);
}

TEST_P(CudaSelfRouted, PiecesEqualTheCpus) {
  const TinyModel tiny = model();
  TestContext test;
  Transformer cpu(tiny.load(), test.context);
  CudaTransformer gpu(tiny.load(), 0);
  const auto ids = random_ids(20);
  std::vector<std::vector<double>> expected;
  Runner on_cpu(cpu);
  for (const auto& row : on_cpu.run_pieces(ids, 20)) expected.emplace_back(row.begin(), row.end());
  for (const std::size_t n : {20, 7, 1}) {
    Runner runner(gpu);
    EXPECT_LT(relative_error(runner.run_pieces(ids, n), expected), kTolerance) << n;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, CudaSelfRouted,
    ::testing::Values(
        SelfRoutedCase{{}, {"glu+gate", "glu+gate"}, "Gate"},
        SelfRoutedCase{{.dtype = DType::Q4_1}, {"glu+input", "glu+input"}, "InputQ4_1"},
        SelfRoutedCase{{.dtype = DType::Q5_0}, {"glu+gate", "glu+input"}, "NoColumnsQ5_0"},
        SelfRoutedCase{{.dtype = DType::BF16, .moe_layers = {1, 3}},
                       {"glu+gate", "glu+low_rank", "glu+input", "glu+low_rank", "dense"},
                       "EveryKindBF16"},
        SelfRoutedCase{{.architecture = "gemma3", .dtype = DType::Q8_0, .window = 8},
                       {"glu+gate", "dense", "glu+input"},
                       "GemmaQ8_0"}),
    [](const auto& instance) { return instance.param.name; });

class CudaDecoder : public cuda::OnDevice {};

// Every part of the general form once, in blocks.
TEST_F(CudaDecoder, MixturesEqualTheCpus) {
  using enum kernels::ExpertKind;
  using kernels::GateKind, kernels::RouterKind;
  constexpr std::array<kernels::MixtureKind, 4> kKinds = {
      {{Gelu, RouterKind::ProductKey, GateKind::Softmax},
       {Linear, RouterKind::ProductKey, GateKind::Score},
       {Gelu, RouterKind::LowRank, GateKind::Softmax},
       {Glu, RouterKind::FullRank, GateKind::None}}};
  for (const kernels::MixtureKind& kind : kKinds) {
    const TinyModel tiny = tiny_mixture(packed_mixture(kind, 2));
    TestContext test;
    Transformer cpu(tiny.load(), test.context);
    CudaTransformer gpu(tiny.load(), 0);
    const auto prompt = random_ids(11);
    EXPECT_EQ(greedy(gpu, prompt, 12), greedy(cpu, prompt, 12)) << kind_name(kind);
    std::vector<std::vector<double>> expected;
    Runner on_cpu(cpu), on_gpu(gpu);
    for (const auto& row : on_cpu.run_pieces(prompt, 11)) {
      expected.emplace_back(row.begin(), row.end());
    }
    EXPECT_LT(relative_error(on_gpu.run_pieces(prompt, 11), expected), kTolerance)
        << kind_name(kind);
  }
}

TEST_F(CudaDecoder, SequencesInOneBatchDoNotMix) {
  const TinyModel tiny({.moe_layers = {1}});
  CudaTransformer gpu(tiny.load(), 0);
  const auto a = random_ids(8, 5), b = random_ids(8, 6);
  const auto expected_a = tiny.reference.logits(a), expected_b = tiny.reference.logits(b);
  Runner runner(gpu);
  runner.run_pieces({b.begin(), b.begin() + 4}, 4, 2);
  runner.run_pieces({a.begin(), a.begin() + 7}, 7, 0);
  const Rows first = runner.run({a[7], b[4]}, {0, 2}, {7, 4}, {0, 1});
  EXPECT_LT(relative_error(first, {expected_a[7], expected_b[4]}), kTolerance);
  const Rows second = runner.run({b[5], b[6], b[7]}, {2, 2, 2}, {5, 6, 7}, {0, 1, 2});
  EXPECT_LT(relative_error(second, {expected_b[5], expected_b[6], expected_b[7]}), kTolerance);
}

TEST_F(CudaDecoder, OutputsPickTheirRows) {
  const TinyModel tiny({});
  CudaTransformer gpu(tiny.load(), 0);
  const auto ids = random_ids(10);
  const auto expected = tiny.reference.logits(ids);
  Runner runner(gpu);
  const std::vector<std::int32_t> slots(10, 1), positions = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  const Rows found = runner.run(ids, slots, positions, {0, 3, 9});
  EXPECT_LT(relative_error(found, {expected[0], expected[3], expected[9]}), kTolerance);
  EXPECT_TRUE(runner.run(ids, slots, positions, {}).empty());
  EXPECT_TRUE(runner.run({}, {}, {}, {}).empty());
}

// The sampler's tokens from the CPU's logits; those of the GPU are a few roundings away.
TEST_F(CudaDecoder, DrawsTheSamplersTokens) {
  const TinyModel tiny({.moe_layers = {1}});
  TestContext test;
  Transformer cpu(tiny.load(), test.context);
  CudaTransformer gpu(tiny.load(), 0);
  std::vector<engine::Request> requests(4);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    requests[i].prompt = random_ids(5 + 3 * i, i);
    requests[i].max_tokens = 24;
    // The likeliest token is far ahead of the others: hot, and without cuts by likelihood.
    requests[i].sampling.temperature = i == 3 ? 0.0F : 10 + static_cast<float>(i);
    requests[i].sampling.min_p = 0;
    requests[i].sampling.top_p = 1;
    requests[i].sampling.seed = i;
  }
  requests[1].sampling.top_k = 0;
  requests[2].sampling.top_k = 5;
  const auto text = [](std::int32_t) { return std::string("."); };
  const auto expected = engine::generate(cpu, requests, text, {.n_parallel = 2});
  const auto found = engine::generate(gpu, requests, text, {.n_parallel = 2});
  for (std::size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(found[i].tokens, expected[i].tokens) << i;
    EXPECT_EQ(found[i].tokens == greedy(cpu, requests[i].prompt, 24), i == 3) << i;
  }
}

TEST_F(CudaDecoder, DrawsAndLogitsTakeTurns) {
  const TinyModel tiny({.n_layers = 1});
  CudaTransformer gpu(tiny.load(), 0);
  const auto ids = random_ids(12);
  const auto expected = tiny.reference.logits(ids);
  Runner runner(gpu, 1, 12);
  for (std::int32_t t = 0; t < 12; ++t) {
    const auto i = static_cast<std::size_t>(t);
    const auto best = static_cast<std::int32_t>(
        std::max_element(expected[i].begin(), expected[i].end()) - expected[i].begin());
    const kernels::Draw greedy;
    const std::int32_t slot = 0, output = 0;
    std::int32_t id = -1;
    gpu.forward_and_draw({{&ids[i], 1}, {&slot, 1}, {&t, 1}, {&output, 1}}, *runner.cache,
                         {&greedy, 1}, {&id, 1});
    EXPECT_EQ(id, best);
    EXPECT_LT(relative_error(runner.run({ids[i]}, {0}, {t}, {0}), {expected[i]}), kTolerance);
  }
  const std::vector<std::int32_t> none;
  gpu.forward_and_draw({none, none, none, none}, *runner.cache, {}, {});
  const kernels::Draw draws[2];
  std::int32_t id = 0;
  const std::vector<std::int32_t> zero = {0};
  EXPECT_THROW(gpu.forward_and_draw({zero, zero, zero, zero}, *runner.cache, draws, {&id, 1}),
               ShapeError);
}

TEST_F(CudaDecoder, GraphsSurviveLargerBatchesAndOtherCaches) {
  const TinyModel tiny({.moe_layers = {0}});
  CudaTransformer gpu(tiny.load(), 0);
  const auto ids = random_ids(40);
  const auto expected = tiny.reference.logits(ids);
  for (const std::int64_t capacity : {40, 300}) {
    Runner runner(gpu, 1, capacity);
    runner.run_pieces({ids.begin(), ids.begin() + 2}, 1);
    for (std::int32_t t = 2; t < 4; ++t) {
      const Rows row = runner.run({ids[static_cast<std::size_t>(t)]}, {0}, {t}, {0});
      EXPECT_LT(relative_error(row, {expected[static_cast<std::size_t>(t)]}), kTolerance);
    }
    Runner larger(gpu, 2, capacity);
    EXPECT_LT(relative_error(larger.run_pieces(ids, 40, 1), expected), kTolerance);
    const Rows row = runner.run({ids[4]}, {0}, {4}, {0});
    EXPECT_LT(relative_error(row, {expected[4]}), kTolerance);
  }
}

TEST_F(CudaDecoder, CachesOfOneShapeDoNotMix) {
  const TinyModel tiny({});
  CudaTransformer gpu(tiny.load(), 0);
  const auto a = random_ids(6, 5), b = random_ids(6, 6);
  const auto expected_a = tiny.reference.logits(a), expected_b = tiny.reference.logits(b);
  Runner first(gpu, 1, 40), second(gpu, 1, 40);
  for (std::size_t t = 0; t < 6; ++t) {
    const auto position = static_cast<std::int32_t>(t);
    EXPECT_LT(relative_error(first.run({a[t]}, {0}, {position}, {0}), {expected_a[t]}), kTolerance);
    EXPECT_LT(relative_error(second.run({b[t]}, {0}, {position}, {0}), {expected_b[t]}),
              kTolerance);
  }
}

// Position 256 needs another graph, and a second block of keys.
TEST_F(CudaDecoder, PositionsCrossTheFirstGraphsReach) {
  const TinyModel tiny({.n_layers = 1});
  CudaTransformer gpu(tiny.load(), 0);
  const auto ids = random_ids(260);
  const auto expected = tiny.reference.logits(ids);
  Runner runner(gpu, 1, 300);
  runner.run_pieces({ids.begin(), ids.begin() + 253}, 64);  // float32: no batch is a prompt's
  for (std::size_t t = 253; t < 260; ++t) {
    const Rows row = runner.run({ids[t]}, {0}, {static_cast<std::int32_t>(t)}, {0});
    EXPECT_LT(relative_error(row, {expected[t]}), kTolerance) << t;
  }
}

// Their pages lie between each other's.
TEST_F(CudaDecoder, SequencesThatGrowInTurn) {
  const TinyModel tiny({.n_layers = 2});
  CudaTransformer gpu(tiny.load(), 0);
  const auto a = random_ids(140, 7), b = random_ids(140, 8);
  const auto expected_a = tiny.reference.logits(a), expected_b = tiny.reference.logits(b);
  Runner runner(gpu, 2, 140);
  for (std::int32_t begin = 0; begin < 140; begin += 35) {
    for (std::int32_t slot = 0; slot < 2; ++slot) {
      const auto& expected = slot == 0 ? expected_a : expected_b;
      std::vector<std::int32_t> tokens, slots(35, slot), positions, outputs;
      for (std::int32_t t = 0; t < 35; ++t) {
        tokens.push_back((slot == 0 ? a : b)[static_cast<std::size_t>(begin + t)]);
        positions.push_back(begin + t);
        outputs.push_back(t);
      }
      const Rows rows = runner.run(tokens, slots, positions, outputs);
      EXPECT_LT(relative_error(rows, {expected.begin() + begin, expected.begin() + begin + 35}),
                kTolerance)
          << "slot " << slot << " from " << begin;
    }
  }
}

TEST_F(CudaDecoder, BadBatchesAreRefused) {
  const TinyModel tiny({});
  CudaTransformer gpu(tiny.load(), 0);
  Runner runner(gpu, 2, 8);
  EXPECT_THROW(runner.run({80}, {0}, {0}, {0}), InputError);  // id
  EXPECT_THROW(runner.run({-1}, {0}, {0}, {0}), InputError);  // id
  EXPECT_THROW(runner.run({1}, {0}, {8}, {0}), InputError);   // position
  EXPECT_THROW(runner.run({1}, {2}, {0}, {0}), ShapeError);   // slot
  EXPECT_THROW(runner.run({1}, {0}, {0}, {1}), ShapeError);   // output row
  const engine::DecoderShape shape = gpu.shape();
  engine::HostKvCache on_host(shape.n_layers, 2, 8, shape.n_kv_heads, shape.head_dim);
  std::vector<float> logits(TinyModel::kVocab);
  const std::vector<std::int32_t> one = {0};
  EXPECT_THROW(
      gpu.forward({one, one, one, one}, on_host, Matrix(logits.data(), 1, TinyModel::kVocab)),
      ShapeError);
}

TEST_F(CudaDecoder, DevicesThatAreNotThereAreNamed) {
  const TinyModel tiny({});
  try {
    CudaTransformer gpu(tiny.load(), 9);
    FAIL() << "accepted";
  } catch (const DeviceError& e) {
    EXPECT_NE(std::string(e.what()).find("cuda:9"), std::string::npos) << e.what();
  }
}

// What the step counters are read from (tests/models/cuda/steps.cmake): so many tokens after the
// first.
class CudaSteps : public cuda::OnDevice {
 protected:
  void decode(int n_tokens) {
    const TinyModel tiny({.n_layers = 3, .moe_layers = {1}}, [](TinyModel& m) {
      add_self_routed(m, {"glu+gate", "glu+low_rank", "glu+input"}, 0.1F, 0.4F);
    });
    CudaTransformer gpu(tiny.load(), 0);
    Runner runner(gpu, 1, 64);
    const kernels::Draw draw{.temperature = 0.8F, .top_k = 40, .top_p = 0.95F, .random = 0.5};
    std::int32_t id = 0;
    for (std::int32_t t = 0; t < n_tokens; ++t) {
      const std::int32_t position = t, slot = 0, output = 0, token = id;
      gpu.forward_and_draw({{&token, 1}, {&slot, 1}, {&position, 1}, {&output, 1}}, *runner.cache,
                           {&draw, 1}, {&id, 1});
    }
  }
};

TEST_F(CudaSteps, Ten) { decode(10); }
TEST_F(CudaSteps, Thirty) { decode(30); }

}  // namespace
}  // namespace moesaic::models
