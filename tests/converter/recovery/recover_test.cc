// Self-routed layers from training into a file: formats, shares, and what stays as it was.

#include "converter/recovery/recover.h"

#include <cstring>

#include "converter/recovery/hybrid.h"
#include "converter/recovery/trainer.h"
#include "kernels/base/error.h"
#include "kernels/quant.h"
#include "tests/converter/recovery/gradient_check.h"
#include "tests/converter/recovery/self_routed_model.h"
#include "tests/converter/scratch_folder.h"

namespace moesaic::converter {
namespace {

using models::TinyModel;

// A monitor that says nothing.
class Silent : public engine::Monitor {
 public:
  void line(std::string_view text) override { lines.emplace_back(text); }
  std::vector<std::string> lines;
};

struct WriteCase {
  const char* name;
  bool up_by_input;
  std::optional<DType> type;
};

void PrintTo(const WriteCase& c, std::ostream* out) { *out << c.name; }

class RecoverSelfRouted : public testing::TestWithParam<WriteCase> {
 protected:
  static RecoverOptions options() {
    RecoverOptions o;
    o.tokens = 64 * 30;
    o.batch = 64;
    o.part = 32;
    o.n_ctx = 16;
    o.held_out = 64;
    o.scale_tokens = 0;
    o.rate = 2e-2;
    o.judge_every = 10;
    o.expert_type = GetParam().type;
    return o;
  }
  RecoveryFiles files() const {
    return {folder_.path / "training.gguf", folder_.path / "scales.gguf"};
  }
  Recovered recovered() {
    return recover(dense_.load(), hybrid_.load(), tokens_, options(), files(), lent_.ctx, monitor_);
  }

  TinyModel dense_{{.n_layers = 3, .tied = false}};
  TinyModel hybrid_{{.n_layers = 3, .tied = false}, [](TinyModel& m) {
                      self_route({0, 2}, GetParam().up_by_input, 3)(m);
                      replace_up(m, {0, 2});
                    }};
  Lent lent_;
  Silent monitor_;
  ScratchFolder folder_;
  std::vector<std::int32_t> tokens_ = models::random_ids(64 * 16);
};

TEST_P(RecoverSelfRouted, WritesRoundedMatricesAndTheSharesThatTheyHave) {
  const Recovered done = recovered();
  EXPECT_LT(done.report.kl_trained, done.report.kl_start);
  EXPECT_LT(done.report.kl_packed, done.report.kl_start);
  EXPECT_EQ(done.report.curve.size(), 3U);
  EXPECT_GT(done.report.active_packed, 0.3);
  EXPECT_LT(done.report.active_packed, 0.9);
  const auto path = folder_.path / "out.gguf";
  const auto before = hybrid_.load();
  write_recovered(*before->file, done, path);
  const auto after = models::Checkpoint::load(path);

  // Everything else is as it was, in its place.
  ASSERT_EQ(before->file->tensors().size(), after->file->tensors().size());
  for (std::size_t i = 0; i < before->file->tensors().size(); ++i) {
    const models::GgufTensor& a = before->file->tensors()[i];
    const models::GgufTensor& b = after->file->tensors()[i];
    ASSERT_EQ(a.name, b.name);
    const bool converted = (a.name.starts_with("blk.0.") || a.name.starts_with("blk.2.")) &&
                           (a.name.find("ffn_gate") != std::string::npos ||
                            a.name.find("ffn_up") != std::string::npos ||
                            a.name.find("ffn_down") != std::string::npos ||
                            a.name.find("threshold") != std::string::npos);
    const bool matrix = converted && a.name.find("threshold") == std::string::npos;
    EXPECT_EQ(b.dtype, matrix ? GetParam().type.value_or(a.dtype) : a.dtype) << a.name;
    EXPECT_EQ(a.bytes == b.bytes && std::memcmp(a.data, b.data, a.bytes) == 0, !converted)
        << a.name;
  }
  EXPECT_NEAR(after->file->get_float("moesaic.active_fraction"), after->active_fraction(), 1e-6);

  // What is written is what was judged as packed, and the runtime finds the shares of the metadata
  // on the text that rounding went by: here, all of what was trained on.
  Hybrid<Bfloat16> model(*after, lent_.ctx, 16, false);
  const std::int64_t n_train = 16 * 4 * 15;
  std::vector<std::uint16_t> h(static_cast<std::size_t>(n_train * TinyModel::kModel));
  model.forward(std::span(tokens_).first(n_train), {h.data(), n_train, TinyModel::kModel});
  for (auto& c : model.converted()) {
    const auto& routed = *c.self_routed();
    const SelfRoutedTriple shares = routed.seen.shares(routed.layer.shape());
    const auto& was =
        std::get<kernels::SelfRoutedView>(before->layers[static_cast<std::size_t>(c.layer)].mlp);
    const SelfRoutedTriple planned = {was.input_share, was.gate_share, was.hidden_share};
    for (const auto v : {kInput, kGate, kHidden}) {
      EXPECT_NEAR(shares[v], routed.target[v], 1e-6) << "layer " << c.layer << " vector " << v;
      // bfloat16 moves a few activations over their thresholds.
      EXPECT_NEAR(shares[v], planned[v], 2e-3) << "layer " << c.layer << " vector " << v;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, RecoverSelfRouted,
                         testing::Values(WriteCase{"GateAsItWas", false, {}},
                                         WriteCase{"GateQ8", false, DType::Q8_0},
                                         WriteCase{"InputQ5", true, DType::Q5_1}),
                         [](const auto& info) { return std::string(info.param.name); });

// A model whose rows hold whole blocks, coarse ones.
class RecoverScales : public testing::Test {
 protected:
  RecoverScales() {
    options_.batch = 64;
    options_.part = 32;
    options_.n_ctx = 16;
    options_.held_out = 64;
    options_.rate = 2e-2;
    options_.scale_rate = 5e-3;
    options_.judge_every = 10;
    options_.expert_type = DType::Q4_1;
  }
  RecoveryFiles files() const {
    return {folder_.path / "training.gguf", folder_.path / "scales.gguf"};
  }
  Recovered recovered(const models::Checkpoint* from = nullptr) {
    auto hybrid = from ? std::make_shared<models::Checkpoint>(*from) : hybrid_.load();
    return recover(dense_.load(), hybrid, tokens_, options_, files(), lent_.ctx, monitor_);
  }
  std::shared_ptr<const models::Checkpoint> written(const Recovered& done, const char* name) {
    write_recovered(*hybrid_.load()->file, done, folder_.path / name);
    return models::Checkpoint::load(folder_.path / name);
  }
  TinyModel dense_{{.n_layers = 3, .tied = false}};
  TinyModel hybrid_{{.n_layers = 3, .tied = false}, [](TinyModel& m) {
                      self_route({0, 2}, false, 3)(m);
                      replace_up(m, {0, 2});
                    }};
  Lent lent_;
  Silent monitor_;
  ScratchFolder folder_;
  std::vector<std::int32_t> tokens_ = models::random_ids(64 * 16);
  RecoverOptions options_;
};

TEST_F(RecoverScales, LowerTheDivergenceAfterRounding) {
  options_.tokens = 64 * 10;
  options_.scale_tokens = 64 * 30;
  const Recovered done = recovered();
  EXPECT_EQ(done.report.tokens, 64 * 40);
  ASSERT_EQ(done.report.curve.size(), 4U);
  EXPECT_EQ(done.report.curve[1].tokens, 64 * 20);
  EXPECT_LT(done.report.kl_packed, done.report.kl_rounded);
  // The file holds what was judged.
  const auto file = written(done, "out.gguf");
  EXPECT_NEAR(file->file->get_float("moesaic.recovery.kl_end"), done.report.kl_packed, 1e-6);
  RecoverOptions judge = options_;
  Trainer trainer(dense_.load(), *file, lent_.ctx, tokens_, judge);
  EXPECT_NEAR(trainer.judge().kl, done.report.kl_packed, 1e-9);
}

// Of a file that is there, without training its weights: codes stay, bit for bit.
TEST_F(RecoverScales, LeavesTheCodesOfAFile) {
  options_.tokens = 64;
  options_.scale_tokens = 0;
  options_.rate = 0;
  const auto before = written(recovered(), "before.gguf");
  options_.tokens = 0;
  options_.scale_tokens = 64 * 20;
  const Recovered done = recovered(before.get());
  EXPECT_LT(done.report.kl_packed, done.report.kl_start);
  EXPECT_EQ(done.report.kl_rounded, done.report.kl_start);
  ASSERT_EQ(done.layers.size(), 2U);
  for (const auto& [layer, packed] : done.layers) {
    const auto& own = std::get<models::PackedSelfRouted>(packed);
    const auto was =
        std::get<kernels::SelfRoutedView>(before->layers[static_cast<std::size_t>(layer)].mlp);
    ASSERT_EQ(own.up_dtype, DType::Q4_1);
    bool scales_differ = false;
    for (std::int64_t b = 0; b < was.w_up.bytes() / 20; ++b) {
      const std::byte* x = own.w_up.data() + b * 20;
      const std::byte* y = was.w_up.data + b * 20;
      EXPECT_EQ(std::memcmp(x + 4, y + 4, 16), 0) << "block " << b;
      scales_differ |= std::memcmp(x, y, 4) != 0;
    }
    EXPECT_TRUE(scales_differ);
  }
}

// A monitor that interrupts after so many steps of a stage.
class Interrupting : public Silent {
 public:
  Interrupting(std::string stage, std::int64_t steps) : stage_(std::move(stage)), steps_(steps) {}
  void stage(std::string_view name, std::int64_t) override { here_ = name == stage_; }
  void advance(std::int64_t done, std::string_view) override { cut_ |= here_ && done == steps_; }
  bool cancelled() const override { return cut_; }

 private:
  std::string stage_;
  std::int64_t steps_;
  bool here_ = false, cut_ = false;
};

TEST_F(RecoverScales, CutInEitherTrainingGoesOnBitForBit) {
  options_.tokens = 64 * 6;
  options_.scale_tokens = 64 * 6;
  const auto whole = written(recovered(), "whole.gguf");
  for (const char* stage : {"recover", "tune scales"}) {
    std::filesystem::remove(files().weights);
    std::filesystem::remove(files().scales);
    Interrupting cut(stage, 3);
    EXPECT_THROW(recover(dense_.load(), hybrid_.load(), tokens_, options_, files(), lent_.ctx, cut),
                 Interrupted);
    const auto resumed = written(recovered(), "resumed.gguf");
    for (const models::GgufTensor& t : whole->file->tensors()) {
      const models::GgufTensor* other = resumed->file->find_tensor(t.name);
      ASSERT_NE(other, nullptr);
      EXPECT_EQ(std::memcmp(t.data, other->data, t.bytes), 0) << stage << ": " << t.name;
    }
  }
}

// Its updates are merged: the file holds what was judged, and nothing beside the matrices.
TEST_F(RecoverScales, AttentionIsWrittenMerged) {
  options_.tokens = 64 * 20;
  options_.scale_tokens = 64 * 10;
  options_.attention_rank = 4;
  const Recovered done = recovered();
  EXPECT_LT(done.report.kl_packed, done.report.kl_start);
  const auto file = written(done, "out.gguf");
  const auto before = hybrid_.load();
  ASSERT_EQ(file->file->tensors().size(), before->file->tensors().size());
  for (const models::GgufTensor& t : before->file->tensors()) {
    if (t.name.find("attn_") == std::string::npos) continue;
    const models::GgufTensor* now = file->file->find_tensor(t.name);
    ASSERT_NE(now, nullptr) << t.name;
    EXPECT_EQ(now->dims, t.dims) << t.name;
    EXPECT_EQ(now->dtype, t.dtype) << t.name;
    const bool learnt = !t.name.starts_with("blk.0.") && t.name.find("norm") == std::string::npos;
    EXPECT_EQ(std::memcmp(now->data, t.data, t.bytes) != 0, learnt) << t.name;
  }
  Trainer trainer(dense_.load(), *file, lent_.ctx, tokens_, options_);
  EXPECT_NEAR(trainer.judge().kl, done.report.kl_packed, 1e-9);
}

TEST_F(RecoverScales, RefusesWhatTrainsNothing) {
  const auto expect_refusal = [&](std::int64_t tokens, std::int64_t scale_tokens) {
    options_.tokens = tokens;
    options_.scale_tokens = scale_tokens;
    EXPECT_THROW(recovered(), InputError) << tokens << ", " << scale_tokens;
  };
  expect_refusal(0, 0);
  expect_refusal(0, 64);  // the hybrid is in F32
  expect_refusal(63, 0);
  expect_refusal(64, 63);
  EXPECT_TRUE(monitor_.lines.empty());
}

TEST(RecoverTypes, RefusesBeforeTheTraining) {
  const TinyModel dense({.tied = false});
  const TinyModel hybrid({.tied = false}, self_route({0, 1}, false, 2));
  Lent lent;
  Silent monitor;
  const ScratchFolder folder;
  const auto tokens = models::random_ids(64);
  RecoverOptions o;
  o.tokens = 16;
  o.batch = o.part = o.n_ctx = 16;
  o.expert_type = DType::Q4_K;  // read only, and no block fits 64 columns
  EXPECT_THROW(recover(dense.load(), hybrid.load(), tokens, o,
                       {folder.path / "w", folder.path / "s"}, lent.ctx, monitor),
               InputError);
  EXPECT_TRUE(monitor.lines.empty());
}

}  // namespace
}  // namespace moesaic::converter
