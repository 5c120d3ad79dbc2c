#include "models/transformer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/kv_cache.h"
#include "kernels/base/error.h"
#include "tests/models/tiny_model.h"

namespace moesaic::models {
namespace {

using Rows = std::vector<std::vector<float>>;

// One model with threads, cache and scratch, run by hand.
struct Runner {
  explicit Runner(const TinyModel& tiny, int n_threads = 2,
                  Activations activations = Activations::F32, std::int64_t n_slots = 3,
                  std::int64_t capacity = 64)
      : test(n_threads, activations),
        model(tiny.load(), test.context),
        cache(model.shape().n_layers, n_slots, capacity, model.shape().n_kv_heads,
              model.shape().head_dim) {}

  Rows run(const std::vector<std::int32_t>& tokens, const std::vector<std::int32_t>& slots,
           const std::vector<std::int32_t>& positions, const std::vector<std::int32_t>& outputs) {
    std::vector<float> logits(outputs.size() * TinyModel::kVocab);
    model.forward(
        {tokens, slots, positions, outputs}, cache,
        Matrix(logits.data(), static_cast<std::int64_t>(outputs.size()), TinyModel::kVocab));
    Rows rows;
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      rows.emplace_back(logits.begin() + static_cast<std::ptrdiff_t>(i * TinyModel::kVocab),
                        logits.begin() + static_cast<std::ptrdiff_t>((i + 1) * TinyModel::kVocab));
    }
    return rows;
  }

  // One sequence in pieces of n tokens, logits of every row.
  Rows run_pieces(const std::vector<std::int32_t>& ids, std::size_t n, std::int32_t slot = 0) {
    Rows rows;
    for (std::size_t begin = 0; begin < ids.size(); begin += n) {
      const std::size_t end = std::min(begin + n, ids.size());
      std::vector<std::int32_t> tokens, slots, positions, outputs;
      for (std::size_t t = begin; t < end; ++t) {
        tokens.push_back(ids[t]);
        slots.push_back(slot);
        positions.push_back(static_cast<std::int32_t>(t));
        outputs.push_back(static_cast<std::int32_t>(t - begin));
      }
      const Rows piece = run(tokens, slots, positions, outputs);
      rows.insert(rows.end(), piece.begin(), piece.end());
    }
    return rows;
  }

  TestContext test;
  Transformer model;
  engine::HostKvCache cache;
};

// Largest difference over the root mean square of the expected logits.
template <class Expected>
double relative_error(const Rows& found, const Expected& expected) {
  EXPECT_EQ(found.size(), expected.size());
  double largest = 0, squares = 0, n = 0;
  for (std::size_t t = 0; t < std::min(found.size(), expected.size()); ++t) {
    for (std::size_t i = 0; i < expected[t].size(); ++i) {
      const double e = expected[t][i];
      largest = std::max(largest, std::abs(found[t][i] - e));
      squares += e * e;
      ++n;
    }
  }
  return largest / std::sqrt(squares / n);
}

// Rounding of sums of about a hundred terms, through a handful of layers that each renorm the
// stream: some hundred ulps of float32.
constexpr double kTolerance = 300 * 1.2e-7;

struct Case {
  TinyOptions options;
  std::string name;
};

class TransformerOn : public testing::TestWithParam<Case> {};

TEST_P(TransformerOn, PrefillEqualsTheLoops) {
  const TinyModel tiny(GetParam().options);
  const auto ids = random_ids(40);
  const auto expected = tiny.reference.logits(ids);
  for (const int n_threads : {1, 2, 3}) {
    Runner runner(tiny, n_threads);
    EXPECT_LT(relative_error(runner.run_pieces(ids, ids.size()), expected), kTolerance);
  }
}

TEST_P(TransformerOn, TokenByTokenAndPiecesEqualTheLoops) {
  const TinyModel tiny(GetParam().options);
  const auto ids = random_ids(40);
  const auto expected = tiny.reference.logits(ids);
  for (const std::size_t n : {1, 7, 39}) {
    Runner runner(tiny);
    EXPECT_LT(relative_error(runner.run_pieces(ids, n), expected), kTolerance) << n;
  }
}

TEST_P(TransformerOn, SequencesInOneBatchDoNotMix) {
  const TinyModel tiny(GetParam().options);
  const auto a = random_ids(12, 5);
  const auto b = random_ids(9, 6);
  Runner runner(tiny);
  // b's first half is there before; then the rest of b in one batch with all of a, interleaved.
  runner.run_pieces({b.begin(), b.begin() + 4}, 4, 2);
  std::vector<std::int32_t> tokens, slots, positions, outputs;
  std::vector<std::pair<bool, std::size_t>> what;  // is a, position
  for (std::size_t t = 0; t < a.size(); ++t) {
    tokens.push_back(a[t]);
    slots.push_back(0);
    positions.push_back(static_cast<std::int32_t>(t));
    what.emplace_back(true, t);
    if (4 + t < b.size()) {
      tokens.push_back(b[4 + t]);
      slots.push_back(2);
      positions.push_back(static_cast<std::int32_t>(4 + t));
      what.emplace_back(false, 4 + t);
    }
  }
  for (std::size_t i = 0; i < tokens.size(); ++i) outputs.push_back(static_cast<std::int32_t>(i));
  const Rows found = runner.run(tokens, slots, positions, outputs);
  const auto logits_a = tiny.reference.logits(a);
  const auto logits_b = tiny.reference.logits(b);
  std::vector<std::vector<double>> expected;
  for (const auto& [is_a, t] : what) expected.push_back(is_a ? logits_a[t] : logits_b[t]);
  EXPECT_LT(relative_error(found, expected), kTolerance);
}

TEST_P(TransformerOn, Bf16ActivationsStayClose) {
  const TinyModel tiny(GetParam().options);
  const auto ids = random_ids(20);
  Runner runner(tiny, 2, Activations::BF16);
  // bfloat16 keeps 8 bits: 2^-9 per rounding, summed over layers, largest of 1600 logits.
  const double error =
      relative_error(runner.run_pieces(ids, ids.size()), tiny.reference.logits(ids));
  if (GetParam().options.moe_layers.empty()) {
    EXPECT_LT(error, 0.1);
  }
  EXPECT_GT(error, 1e-5);  // it does round
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, TransformerOn,
    testing::Values(Case{{.architecture = "llama"}, "Llama"},
                    Case{{.architecture = "llama", .tied = false}, "LlamaUntied"},
                    Case{{.architecture = "llama", .dtype = DType::Q8_0}, "LlamaQ8_0"},
                    Case{{.architecture = "llama", .dtype = DType::Q4_1}, "LlamaQ4_1"},
                    Case{{.architecture = "llama", .dtype = DType::BF16}, "LlamaBF16"},
                    Case{{.architecture = "llama", .window = 5}, "LlamaWindow"},
                    Case{{.architecture = "llama", .moe_layers = {1}}, "LlamaHybrid"},
                    Case{{.architecture = "llama", .dtype = DType::Q8_0, .moe_layers = {0, 1}},
                         "LlamaHybridQ8_0"},
                    Case{{.architecture = "gemma3", .n_layers = 7, .window = 8}, "GemmaWindow"},
                    Case{{.architecture = "gemma3", .n_layers = 2, .window = 512},
                         "GemmaLongWindow"},
                    Case{{.architecture = "gemma3", .n_layers = 2, .window = 8, .moe_layers = {0}},
                         "GemmaHybrid"}),
    [](const auto& instance) { return instance.param.name; });

TEST(Transformer, WindowChangesTheResult) {
  const TinyModel all({.seed = 9});
  const TinyModel some({.window = 5, .seed = 9});
  const auto ids = random_ids(20);
  Runner runner(some);
  const Rows found = runner.run_pieces(ids, ids.size());
  const auto expected = all.reference.logits(ids);
  const auto row = [&](std::size_t t) {
    return relative_error({found[t]}, std::vector<std::vector<double>>{expected[t]});
  };
  EXPECT_LT(row(4), kTolerance);  // the window just holds five positions
  EXPECT_GT(row(5), 1e-3);
}

TEST(Transformer, OutputsPickTheirRows) {
  const TinyModel tiny({});
  const auto ids = random_ids(10);
  const auto expected = tiny.reference.logits(ids);
  Runner runner(tiny);
  std::vector<std::int32_t> slots(10, 1), positions(10);
  for (int i = 0; i < 10; ++i) positions[static_cast<std::size_t>(i)] = i;
  const Rows found = runner.run(ids, slots, positions, {0, 3, 9});
  EXPECT_LT(relative_error(found, std::vector{expected[0], expected[3], expected[9]}), kTolerance);
  EXPECT_TRUE(runner.run(ids, slots, positions, {}).empty());
}

TEST(Transformer, EmptyBatchDoesNothing) {
  const TinyModel tiny({});
  Runner runner(tiny);
  EXPECT_TRUE(runner.run({}, {}, {}, {}).empty());
}

TEST(Transformer, PiecesGiveWhatForwardGives) {
  const TinyModel tiny({.architecture = "gemma3", .window = 4});
  const auto ids = random_ids(6);
  const std::vector<std::int32_t> slots(6, 0), positions = {0, 1, 2, 3, 4, 5};
  Runner runner(tiny);
  const Rows whole = runner.run_pieces(ids, ids.size());
  Transformer& model = runner.model;
  std::vector<float> r(6 * 64), x(6 * 64), y(6 * 64), logits(6 * 80);
  const Matrix residual(r.data(), 6, 64);
  model.embed(ids, residual);
  for (int layer = 0; layer < model.config().n_layers; ++layer) {
    model.attention_block(layer, {slots, positions}, runner.cache.layer(layer), residual);
    model.mlp_input(layer, residual, Matrix(x.data(), 6, 64));
    mlp_forward(runner.test.context, model.checkpoint().layers[static_cast<std::size_t>(layer)].mlp,
                {.x = Matrix(x.data(), 6, 64)}, Matrix(y.data(), 6, 64));
    model.add_mlp_output(layer, Matrix(y.data(), 6, 64), residual);
  }
  model.head(residual, Matrix(logits.data(), 6, 80));
  for (std::size_t t = 0; t < 6; ++t) {
    for (std::size_t i = 0; i < 80; ++i) EXPECT_EQ(logits[t * 80 + i], whole[t][i]);
  }
}

TEST(Transformer, ObserverSeesTheSelectedExperts) {
  const TinyModel tiny({.n_layers = 3, .moe_layers = {0, 2}});
  Runner runner(tiny);
  std::vector<int> layers;
  runner.model.set_selection_observer(
      [&](int layer, std::int64_t n_tokens, std::span<const std::int32_t> selected) {
        layers.push_back(layer);
        EXPECT_EQ(n_tokens, 5);
        ASSERT_EQ(selected.size(), static_cast<std::size_t>(5 * TinyModel::kActive));
        for (std::size_t i = 0; i < selected.size(); ++i) {
          EXPECT_GE(selected[i], 0);
          EXPECT_LT(selected[i], TinyModel::kExperts);
          if (i % TinyModel::kActive != 0) {
            EXPECT_LT(selected[i - 1], selected[i]);
          }
        }
      });
  runner.run_pieces(random_ids(5), 5);
  EXPECT_EQ(layers, (std::vector<int>{0, 2}));
}

TEST(Transformer, SteadyStateTakesNoMoreScratch) {
  const TinyModel tiny({.moe_layers = {1}});
  Runner runner(tiny);
  const auto ids = random_ids(30);
  runner.run({ids[0]}, {0}, {0}, {0});
  const std::size_t warm = runner.test.workspace.capacity();
  for (std::int32_t p = 1; p < 30; ++p) {
    runner.run({ids[static_cast<std::size_t>(p)]}, {0}, {p}, {0});
  }
  EXPECT_EQ(runner.test.workspace.capacity(), warm);
}

TEST(Transformer, DecodeReadsEveryWeightOnce) {
  const TinyModel tiny({});
  Runner runner(tiny);
  runner.run({1}, {0}, {0}, {0});
  runner.test.tally.reset();
  runner.run({2}, {0}, {1}, {0});
  const std::int64_t mlp = 2 * 3 * 64 * 96 * 4;
  const std::int64_t attention = 2 * (64 + 32 + 32 + 64) * 64 * 4;
  EXPECT_EQ(runner.test.tally.bytes(Traffic::Mlp), mlp);
  EXPECT_EQ(runner.test.tally.bytes(Traffic::Attention), attention);
  EXPECT_EQ(runner.test.tally.bytes(Traffic::Head), 80 * 64 * 4);
}

TEST(Transformer, BadBatchesAreRefused) {
  const TinyModel tiny({});
  Runner runner(tiny, 1, Activations::F32, 2, 8);
  EXPECT_THROW(runner.run({80}, {0}, {0}, {0}), InputError);  // id
  EXPECT_THROW(runner.run({-1}, {0}, {0}, {0}), InputError);  // id
  EXPECT_THROW(runner.run({1}, {0}, {8}, {0}), InputError);   // position
  EXPECT_THROW(runner.run({1}, {0}, {-1}, {0}), InputError);  // position
  EXPECT_THROW(runner.run({1}, {2}, {0}, {0}), ShapeError);   // slot
  EXPECT_THROW(runner.run({1}, {0}, {0}, {1}), ShapeError);   // output row
  EXPECT_THROW(runner.run({1, 2}, {0, 0}, {0, 1}, {1, 0}), ShapeError);
  EXPECT_THROW(runner.run({1, 2}, {0}, {0, 1}, {0}), ShapeError);
  std::vector<float> logits(3);
  const std::vector<std::int32_t> one = {0};
  EXPECT_THROW(
      runner.model.forward({one, one, one, one}, runner.cache, Matrix(logits.data(), 1, 3)),
      ShapeError);
}

// What loading the file with a change is refused for.
void expect_refused(const TinyOptions& options, const std::function<void(TinyModel&)>& change,
                    const std::vector<std::string>& words) {
  const TinyModel model(options, change);
  try {
    model.load();
    FAIL() << "accepted, expected an error about " << words[0];
  } catch (const FormatError& e) {
    const std::string text = e.what();
    EXPECT_NE(text.find(model.path.string()), std::string::npos) << text;
    EXPECT_EQ(text.find('\n'), std::string::npos) << text;
    for (const std::string& word : words) EXPECT_NE(text.find(word), std::string::npos) << text;
  }
}

TEST(Checkpoint, EveryTensorIsExpected) {
  const TinyModel whole({.architecture = "gemma3", .n_layers = 1});
  for (const TinyModel::Tensor& tensor : whole.tensors) {
    expect_refused({.architecture = "gemma3", .n_layers = 1},
                   [&](TinyModel& m) { m.erase_tensor(tensor.name); }, {tensor.name});
  }
}

TEST(Checkpoint, WrongShapeNamesFoundAndExpected) {
  expect_refused({},
                 [](TinyModel& m) {
                   m.erase_tensor("blk.1.ffn_up.weight");
                   m.add("blk.1.ffn_up.weight", DType::F32, {64, 64}, 1);
                 },
                 {"blk.1.ffn_up.weight", "[64, 64]", "[96, 64]"});
}

TEST(Checkpoint, NormMustBeF32AndFinite) {
  expect_refused({},
                 [](TinyModel& m) {
                   const float nan = std::numeric_limits<float>::quiet_NaN();
                   std::memcpy(&m.tensor("blk.1.ffn_norm.weight").data[12], &nan, 4);
                 },
                 {"blk.1.ffn_norm.weight[3]", "nan"});
  expect_refused({},
                 [](TinyModel& m) {
                   m.erase_tensor("output_norm.weight");
                   m.add("output_norm.weight", DType::F16, {64}, 1);
                 },
                 {"output_norm.weight", "F16", "F32"});
}

TEST(Checkpoint, PartsThatWouldBeLeftOutAreRefused) {
  for (const char* name :
       {"blk.0.attn_q.bias", "blk.1.ffn_up.bias", "rope_freqs.weight", "blk.0.ffn_gate_exps.weight",
        "blk.0.attn_q_norm.weight", "blk.0.post_ffw_norm.weight", "blk.0.attn_sinks.weight"}) {
    expect_refused({}, [&](TinyModel& m) { m.add(name, DType::F32, {64}, 1); }, {name});
  }
}

TEST(Checkpoint, OtherExtraTensorsAreLeftAlone) {
  const TinyModel model({}, [](TinyModel& m) { m.add("notes", DType::F32, {4}, 1); });
  EXPECT_NO_THROW(model.load());
}

TEST(Checkpoint, HybridLayersMissingPartsAreRefused) {
  expect_refused({.moe_layers = {1}},
                 [](TinyModel& m) { m.erase_tensor("blk.1.moe.experts.weight"); },
                 {"blk.1.moe.experts.weight"});
}

TEST(Checkpoint, ActiveFractionCountsRouterAndBypass) {
  EXPECT_EQ(TinyModel({}).load()->active_fraction(), 1.0);
  const double dense = 3 * 64 * 96;
  const double moe = 3 * 64 * (24 + 7) + 32 * (64 + 40) + 2 * 32 * 64;
  EXPECT_DOUBLE_EQ(TinyModel({.moe_layers = {0}}).load()->active_fraction(), (1 + moe / dense) / 2);
}

}  // namespace
}  // namespace moesaic::models
