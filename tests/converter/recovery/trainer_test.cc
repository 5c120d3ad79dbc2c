// The training loop and the routers' closed-form refit.

#include "converter/recovery/trainer.h"

#include <cstring>
#include <limits>

#include "kernels/base/error.h"
#include "kernels/quant.h"
#include "tests/converter/recovery/gradient_check.h"
#include "tests/converter/recovery/self_routed_model.h"
#include "tests/converter/scratch_folder.h"
#include "tests/models/tiny_model.h"

namespace moesaic::converter {
namespace {

using models::TinyModel;

RecoverOptions options() {
  RecoverOptions o;
  o.tokens = 640;
  o.batch = 64;
  o.part = 32;  // two parts a step
  o.n_ctx = 16;
  o.held_out = 32;
  o.rate = 2e-2;
  o.router_rate = 2e-2;
  return o;
}

// Two checkpoints with one embedding and head and different layers: much to learn.
struct Pair {
  explicit Pair(const char* architecture = "llama")
      : dense({.architecture = architecture, .window = 8, .tied = false}),
        hybrid({.architecture = architecture, .window = 8, .tied = false, .moe_layers = {0, 1}}) {}
  /// Self-routed layers, made of other weights than the dense ones, and a secret MoE behind them.
  explicit Pair(bool up_by_input)
      : dense({.n_layers = 3, .tied = false}),
        hybrid({.n_layers = 3, .tied = false, .moe_layers = {2}, .seed = 1}, [=](TinyModel& m) {
          self_route({0, 1}, up_by_input, 3, {2})(m);
          replace_up(m, {0, 1});
        }) {}
  Trainer trainer(const RecoverOptions& o) {
    return Trainer(dense.load(), *hybrid.load(), lent.ctx, tokens, o);
  }
  TinyModel dense, hybrid;
  Lent lent;
  std::vector<std::int32_t> tokens = models::random_ids(12 * 16);
};

std::vector<float> parameters(Trainer& trainer) {
  std::vector<float> all;
  for (auto& c : trainer.model().converted()) {
    for (const auto& t : c.tensors()) all.insert(all.end(), t.value.begin(), t.value.end());
    if (auto* routed = c.self_routed()) {
      all.insert(all.end(), routed->layer.factors().begin(), routed->layer.factors().end());
    }
  }
  return all;
}

void expect_divergence_falls(Pair& pair) {
  RecoverOptions o = options();
  o.tokens = 64 * 40;
  Trainer trainer = pair.trainer(o);
  const double first = trainer.step().kl;
  double last = 0;
  while (!trainer.done()) last = trainer.step().kl;
  EXPECT_LT(last, 0.7 * first);
}

class RecoveryTrainer : public testing::TestWithParam<const char*> {};

TEST_P(RecoveryTrainer, DivergenceFalls) {
  Pair pair(GetParam());
  expect_divergence_falls(pair);
}

// Trained in one go, and cut after the first step and in the middle.
void expect_resumes_bit_for_bit(Pair& pair) {
  RecoverOptions o = options();
  o.straight_through = 0.1;
  o.refit_every = 4;
  o.refit_memory = 10;
  Trainer whole = pair.trainer(o);
  while (!whole.done()) whole.step();
  const ScratchFolder folder;
  const auto file = folder.path / "training.gguf";
  for (const int cut : {1, 5}) {
    Trainer first = pair.trainer(o);
    for (int i = 0; i < cut; ++i) first.step();
    first.save(file, "a note");
    Trainer second = pair.trainer(o);
    EXPECT_EQ(second.load(file), "a note");
    EXPECT_EQ(second.step_index(), cut);
    // Judging in between changes nothing.
    second.judge();
    while (!second.done()) second.step();
    const std::vector<float> a = parameters(whole), b = parameters(second);
    ASSERT_EQ(a.size(), b.size());
    EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)), 0) << "cut at " << cut;
  }
}

TEST_P(RecoveryTrainer, SavedAndLoadedGoesOnBitForBit) {
  Pair pair(GetParam());
  expect_resumes_bit_for_bit(pair);
}

// Neurons that may not move leave it to the attention.
TEST_P(RecoveryTrainer, AttentionLearnsAndResumesBitForBit) {
  Pair pair(GetParam());
  RecoverOptions o = options();
  o.attention_rank = 4;
  o.rate = 5e-3;
  o.tokens = 64 * 30;
  Trainer whole = pair.trainer(o);
  const double first = whole.step().kl;
  const ScratchFolder folder;
  whole.save(folder.path / "training.gguf", "");
  double last = 0;
  while (!whole.done()) last = whole.step().kl;
  EXPECT_LT(last, 0.95 * first);
  const auto updates = [](Trainer& t) {
    std::vector<float> all;
    for (auto& u : t.model().attention(1).updates()) {
      all.insert(all.end(), u.a().begin(), u.a().end());
      all.insert(all.end(), u.b().begin(), u.b().end());
    }
    return all;
  };
  Trainer resumed = pair.trainer(o);
  resumed.load(folder.path / "training.gguf");
  while (!resumed.done()) resumed.step();
  EXPECT_FALSE(updates(whole).empty());
  EXPECT_EQ(updates(whole), updates(resumed));
  EXPECT_EQ(parameters(whole), parameters(resumed));
}

INSTANTIATE_TEST_SUITE_P(Models, RecoveryTrainer, testing::Values("llama", "gemma3"),
                         [](const auto& info) { return std::string(info.param); });

class RecoveryTrainerSelfRouted : public testing::TestWithParam<bool> {};

TEST_P(RecoveryTrainerSelfRouted, DivergenceFalls) {
  Pair pair(GetParam());
  expect_divergence_falls(pair);
}

TEST_P(RecoveryTrainerSelfRouted, SavedAndLoadedGoesOnBitForBit) {
  Pair pair(GetParam());
  expect_resumes_bit_for_bit(pair);
}

// The thresholds of the file leave other shares than it says; training brings them there. Without
// gain they stay.
TEST_P(RecoveryTrainerSelfRouted, ThresholdsFollowTheirShares) {
  for (const double gain : {0.0, 2.0}) {
    Pair pair(GetParam());
    RecoverOptions o = options();
    o.tokens = 64 * 60;
    o.rate = 1e-3;
    o.threshold_gain = gain;
    Trainer trainer = pair.trainer(o);
    for (auto& c : trainer.model().converted()) {
      if (auto* routed = c.self_routed()) routed->target[kInput] = 0.4F;
    }
    while (!trainer.done()) trainer.step();
    trainer.judge();
    for (auto& c : trainer.model().converted()) {
      auto* routed = c.self_routed();
      if (routed == nullptr) continue;
      const SelfRoutedTriple shares = routed->seen.shares(routed->layer.shape());
      if (gain == 0) {
        EXPECT_EQ(routed->layer.factors(), (SelfRoutedTriple{1, 1, 1}));
        EXPECT_GT(shares[kInput], 0.5F);
        continue;
      }
      // A held-out text of 32 tokens lies off the trained one's share by its own chance.
      for (const auto v : {kInput, kGate, kHidden}) {
        EXPECT_NEAR(shares[v], routed->target[v], 0.05) << "layer " << c.layer << " vector " << v;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, RecoveryTrainerSelfRouted, testing::Bool(),
                         [](const auto& info) { return info.param ? "Input" : "Gate"; });

TEST(RecoveryTrainerErrors, NanGradientNamesStepLayerAndTensor) {
  Pair pair;
  Trainer trainer = pair.trainer(options());
  trainer.step();
  auto& c = trainer.model().converted()[1];
  c.moe()->gradient->w_up[3] = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> before = parameters(trainer);
  try {
    trainer.step();
    FAIL() << "no error";
  } catch (const Error& e) {
    const std::string text = e.what();
    EXPECT_NE(text.find("step 2: the gradient of layer 1, up, is NaN"), std::string::npos) << text;
  }
  EXPECT_EQ(parameters(trainer), before);
}

TEST(RecoveryTrainerErrors, SizesThatDoNotFit) {
  Pair pair;
  RecoverOptions o = options();
  o.batch = 40;
  EXPECT_THROW(pair.trainer(o), InputError);
  pair.tokens.resize(16);
  EXPECT_THROW(pair.trainer(options()), InputError);
}

TEST(RecoveryTrainerErrors, StateOfAnotherTraining) {
  Pair pair;
  RecoverOptions o = options();
  Trainer trainer = pair.trainer(o);
  trainer.step();
  const ScratchFolder folder;
  trainer.save(folder.path / "training.gguf", "");
  const TinyModel other({.n_layers = 2, .moe_layers = {1}});
  Trainer smaller(pair.dense.load(), *other.load(), pair.lent.ctx, pair.tokens, o);
  EXPECT_THROW(smaller.load(folder.path / "training.gguf"), FormatError);
}

// Contributions that a router of that rank can give: the fit gives them, and once they change it
// follows, since what came before is forgotten.
TEST(RouterMoments, RefitFollowsWhatItSees) {
  Lent lent;
  const MoeShape shape{kernels::Activation::Silu, 24, 2, 30, 5, 4, 0};
  RouterMoments moments(shape);
  MoeParameters<float> found(shape);
  const std::int64_t n = 256;
  std::vector<float> weight;
  for (std::int64_t t = 0; t < n; ++t) weight.push_back(0.5F + static_cast<float>(t % 3));
  for (const unsigned seed : {1U, 2U}) {
    const RandomMatrix v(4, 24, seed), u(30, 4, seed + 10), c0(1, 30, seed + 20);
    std::vector<std::uint16_t> x_bits(static_cast<std::size_t>(n * 24));
    std::vector<std::uint16_t> c_bits(static_cast<std::size_t>(n * 30));
    double scale = 0, gap = 0;
    std::vector<float> c(30);
    const auto score = [&](const float* x, std::int64_t e, auto&& at_v, auto&& at_u, double b) {
      double sum = b;
      for (std::int64_t r = 0; r < 4; ++r) {
        double z = 0;
        for (std::int64_t j = 0; j < 24; ++j) z += at_v(r, j) * x[j];
        sum += at_u(e, r) * z;
      }
      return sum;
    };
    const RandomMatrix x(n, 24, seed + 30);
    std::vector<std::vector<float>> rows;
    for (std::int64_t t = 0; t < n; ++t) {
      std::vector<float> row(x.view().row(t), x.view().row(t) + 24);
      to_operand(row.data(), 24, x_bits.data() + t * 24);
      from_operand(x_bits.data() + t * 24, 24, row.data());
      for (std::int64_t e = 0; e < 30; ++e) {
        c[static_cast<std::size_t>(e)] = static_cast<float>(score(
            row.data(), e, [&](auto r, auto j) { return v.view().row(r)[j]; },
            [&](auto i, auto r) { return u.view().row(i)[r]; },
            c0.data[static_cast<std::size_t>(e)]));
      }
      to_operand(c.data(), 30, c_bits.data() + t * 30);
      rows.push_back(row);
    }
    moments.add(lent.ctx, seed == 1 ? 1 : 1e-6, {x_bits.data(), n, 24}, {c_bits.data(), n, 30},
                weight);
    moments.refit(1e-6, found);
    for (const std::vector<float>& row : rows) {
      for (std::int64_t e = 0; e < 30; ++e) {
        const double wanted = score(
            row.data(), e, [&](auto r, auto j) { return v.view().row(r)[j]; },
            [&](auto i, auto r) { return u.view().row(i)[r]; },
            c0.data[static_cast<std::size_t>(e)]);
        const double given = score(
            row.data(), e,
            [&](auto r, auto j) { return found.router_v[static_cast<std::size_t>(r * 24 + j)]; },
            [&](auto i, auto r) { return found.router_u[static_cast<std::size_t>(i * 4 + r)]; },
            found.router_bias[static_cast<std::size_t>(e)]);
        scale += wanted * wanted;
        gap += (wanted - given) * (wanted - given);
      }
    }
    // Inputs and targets are rounded to bfloat16 after their weighting: 2⁻⁹ each.
    EXPECT_LT(std::sqrt(gap / scale), 0.01) << "seed " << seed;
  }
}

}  // namespace
}  // namespace moesaic::converter
