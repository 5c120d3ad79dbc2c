// Whole trainings on a GPU against the CPU's: losses, gradients, steps, saved states.

#include "converter/recovery/hybrid.h"

#include <cstring>
#include <limits>

#include "converter/recovery/cuda/hybrid.h"
#include "converter/recovery/cuda/training.h"
#include "converter/recovery/trainer.h"
#include "kernels/base/error.h"
#include "models/gguf.h"
#include "tests/converter/cuda/on_arrays.h"
#include "tests/converter/recovery/gradient_check.h"
#include "tests/converter/recovery/self_routed_model.h"
#include "tests/converter/relative_difference.h"
#include "tests/converter/scratch_folder.h"
#include "tests/models/tiny_model.h"

namespace moesaic::converter {
namespace {

using models::TinyModel;
using models::TinyOptions;

struct HybridCase {
  const char* name;
  TinyOptions model;
  bool recompute;
  std::vector<int> self_routed;
  bool up_by_input = false;
  bool straight_through = false;  // inputs of self-routed layers, gates of the others
  std::uint32_t d_ff = 0;         // what dense layers would have, if there were any

  TinyModel make() const {
    return TinyModel(model, [&](TinyModel& m) {
      if (d_ff > 0) m.set("llama.feed_forward_length", models::GgufValue::u32(d_ff));
      if (self_routed.empty()) return;
      self_route(self_routed, up_by_input, model.n_layers, model.moe_layers)(m);
    });
  }
};

void PrintTo(const HybridCase& c, std::ostream* out) { *out << c.name; }

constexpr std::int64_t kContext = 8;
constexpr std::int64_t kRows = 3 * kContext;

class CudaHybridTest : public OnArrays, public testing::WithParamInterface<HybridCase> {};

// Both sides round the same operands to bfloat16; sums differ in their last bits, which now and
// then moves an operand to its neighbour, 2⁻⁸ away.
TEST_P(CudaHybridTest, GradientsEqualTheCpus) {
  const HybridCase& c = GetParam();
  const TinyModel file = c.make();
  const auto checkpoint = file.load();
  Lent lent;
  Hybrid<Bfloat16> model(*checkpoint, lent.ctx, kContext, c.recompute);
  for (auto& own : model.converted()) {
    if (auto* routed = own.self_routed()) {
      routed->straight_through = c.straight_through;
    } else {
      own.moe()->router = {.auxiliary = 0.7,
                           .scale = 1.3,
                           .straight_through = c.straight_through ? 0.4 : 0,
                           .width = 0.8};
    }
  }
  cuda::Blas blas(stream);
  CudaScratch scratch(*checkpoint, kRows, kContext, CudaWork::Training);
  CudaHybrid on_device(*checkpoint, &model, c.recompute, scratch, blas, stream);
  const auto tokens = models::random_ids(kRows);
  const auto ids = cuda::on_device(tokens, stream);
  const std::span<const std::int32_t> device_ids(ids.data(), ids.size());

  // A teacher that is somewhere else.
  std::vector<std::uint16_t> teacher(static_cast<std::size_t>(kRows * TinyModel::kModel));
  model.forward(models::random_ids(kRows, 9), {teacher.data(), kRows, TinyModel::kModel});
  const MatrixView<const std::uint16_t> teacher_view(teacher.data(), kRows, TinyModel::kModel);
  const auto device_teacher = cuda::on_device(teacher, stream);

  std::vector<std::uint16_t> h(teacher.size());
  model.forward(tokens, {h.data(), kRows, TinyModel::kModel});
  const cuda::DeviceBuffer<std::uint16_t> device_h(h.size());
  on_device.hidden(device_ids, device_h.data());
  std::vector<float> expected_h(h.size()), found_h(h.size());
  from_operand(h.data(), std::ssize(h), expected_h.data());
  from_operand(cuda::on_host(device_h, stream).data(), std::ssize(h), found_h.data());
  EXPECT_LT(relative_difference(found_h, expected_h), 0.004);

  const auto kl = cuda::on_device(std::vector<double>{0}, stream);
  const double expected_kl = model.divergence(tokens, teacher_view);
  on_device.divergence(device_ids, device_teacher.data(), kl.data());
  EXPECT_NEAR(cuda::on_host(kl, stream)[0], expected_kl, 0.005 * expected_kl);

  model.forget_counts();
  cuda::zero_bytes(reinterpret_cast<std::byte*>(on_device.counts().data()),
                   on_device.counts().size_bytes(), stream);
  cuda::zero_bytes(reinterpret_cast<std::byte*>(on_device.auxiliary().data()),
                   on_device.auxiliary().size_bytes(), stream);
  model.gradients(tokens, teacher_view, 2 * kRows);
  on_device.gradients(device_ids, device_teacher.data(), 2 * kRows, kl.data());
  EXPECT_NEAR(cuda::on_host(kl, stream)[0], 2 * expected_kl, 0.01 * expected_kl);
  ASSERT_EQ(on_device.converted().size(), model.converted().size());
  for (std::size_t i = 0; i < model.converted().size(); ++i) {
    Converted<Bfloat16>& converted = model.converted()[i];
    const auto tensors = converted.tensors();
    ASSERT_EQ(on_device.converted()[i].tensors.size(), tensors.size());
    for (std::size_t m = 0; m < tensors.size(); ++m) {
      const auto found = host<float>(on_device.converted()[i].tensors[m].gradient);
      EXPECT_LT(relative_difference(found, tensors[m].gradient), 0.02)
          << "layer " << converted.layer << " " << tensors[m].name;
    }
    if (const auto* moe = converted.moe()) {
      EXPECT_NEAR(host<double>(on_device.auxiliary())[i], moe->auxiliary, 0.005 * moe->auxiliary);
      continue;
    }
    // Of every token once, run again or not.
    const TrainedSelfRouted<Bfloat16>& own = *converted.self_routed();
    const auto counts = host<cuda::Count>(on_device.converted()[i].counts);
    const std::int64_t runs = own.seen.tokens / kRows;
    const auto near = [&](cuda::Count found, std::int64_t expected) {
      EXPECT_NEAR(static_cast<double>(found), static_cast<double>(expected / runs), 3);
    };
    near(counts[0], own.seen.inputs);
    near(counts[1], own.seen.routed);
    near(counts[2], own.seen.kept);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Models, CudaHybridTest,
    testing::Values(
        HybridCase{"Llama", {.n_layers = 3}, false, {1, 2}},
        HybridCase{"LlamaDenseBetween",
                   {.n_layers = 3, .dtype = DType::Q8_0, .tied = false},
                   true,
                   {0, 2},
                   false,
                   true},
        HybridCase{"LlamaByInput", {.n_layers = 2}, true, {0, 1}, true},
        HybridCase{"Gemma", {.architecture = "gemma3", .n_layers = 2, .window = 4}, false, {0, 1}},
        HybridCase{"LlamaRouters", {.n_layers = 3, .moe_layers = {1, 2}}, false, {}},
        HybridCase{"LlamaRoutersAndNone",
                   {.n_layers = 4, .dtype = DType::Q8_0, .tied = false, .moe_layers = {0, 3}},
                   true,
                   {1},
                   true,
                   true},
        HybridCase{.name = "MoreNeuronsThanTheDense",
                   .model = {.n_layers = 2, .moe_layers = {0, 1}},
                   .recompute = false,
                   .self_routed = {},
                   .d_ff = 32},
        HybridCase{"GemmaRouters",
                   {.architecture = "gemma3", .n_layers = 2, .window = 4, .moe_layers = {0, 1}},
                   false,
                   {},
                   false,
                   true}),
    [](const auto& info) { return std::string(info.param.name); });

RecoverOptions options(bool on_device) {
  RecoverOptions o;
  o.tokens = 320;
  o.scale_tokens = 320;
  o.batch = 64;
  o.part = 32;  // two parts a step
  o.n_ctx = 16;
  o.held_out = 32;
  o.rate = 2e-2;
  o.scale_rate = 1e-2;
  if (on_device) o.device = cuda_training(0);
  return o;
}

class CudaTrainer : public cuda::OnDevice {
 protected:
  Trainer trainer(const RecoverOptions& o, Learns learns = Learns::Weights) {
    return Trainer(dense.load(), *hybrid.load(), lent.ctx, tokens, o, learns);
  }
  // One layer that routes itself, two behind routers.
  Trainer mixed_trainer(const RecoverOptions& o, Learns learns = Learns::Weights) {
    return Trainer(dense.load(), *mixed.load(), lent.ctx, tokens, o, learns);
  }
  static std::vector<float> state(Trainer& trainer) {
    std::vector<float> all;
    for (auto& c : trainer.model().converted()) {
      for (const auto& t : c.tensors()) all.insert(all.end(), t.value.begin(), t.value.end());
      if (c.moe() != nullptr) {
        all.push_back(static_cast<float>(c.moe()->router.scale));
        continue;
      }
      const auto& factors = c.self_routed()->layer.factors();
      all.insert(all.end(), factors.begin(), factors.end());
    }
    return all;
  }

  TinyModel dense{{.n_layers = 3, .dtype = DType::Q8_0, .tied = false}};
  TinyModel hybrid{{.n_layers = 3, .dtype = DType::Q8_0, .tied = false, .seed = 2},
                   [](TinyModel& m) {
                     self_route({0, 2}, false, 3)(m);
                   }};
  TinyModel mixed{
      {.n_layers = 3, .dtype = DType::Q8_0, .tied = false, .moe_layers = {1, 2}, .seed = 2},
      self_route({0}, false, 3, {1, 2})};
  Lent lent;
  std::vector<std::int32_t> tokens = models::random_ids(12 * 16);
};

// Each step's loss, norm and judgement are those of the CPU, whose teacher rounds finer. Adam's
// first steps follow a gradient's sign, however small it is, so rates are low.
TEST_F(CudaTrainer, StepsEqualTheCpus) {
  for (const Learns learns : {Learns::Weights, Learns::Scales}) {
    RecoverOptions o = options(false);
    o.rate = 5e-3;
    o.scale_rate = 2e-3;
    Trainer cpu = trainer(o, learns);
    o.device = cuda_training(0);
    Trainer gpu = trainer(o, learns);
    const auto expect_judgement = [&] {
      const Judgement a = cpu.judge(), b = gpu.judge();
      EXPECT_NEAR(b.kl, a.kl, 0.02 * a.kl);
      EXPECT_NEAR(b.active, a.active, 0.01);
    };
    expect_judgement();
    while (!cpu.done()) {
      const StepResult a = cpu.step(), b = gpu.step();
      EXPECT_NEAR(b.kl, a.kl, 0.02 * a.kl);
      EXPECT_NEAR(b.gradient_norm, a.gradient_norm, 0.03 * a.gradient_norm);
    }
    EXPECT_TRUE(gpu.done());
    expect_judgement();
    const std::vector<float> a = state(cpu), b = state(gpu);
    ASSERT_EQ(a.size(), b.size());
    EXPECT_LT(relative_difference(b, a), 0.02);
  }
}

// Behind routers: their losses, in units of what they were at the start, and the norm of all else.
TEST_F(CudaTrainer, StepsOfRoutersEqualTheCpus) {
  for (const double straight_through : {0.0, 0.3}) {
    RecoverOptions o = options(false);
    o.rate = o.router_rate = 5e-3;
    o.straight_through = straight_through;
    o.clip = 0.05;  // holds
    Trainer cpu = mixed_trainer(o);
    o.device = cuda_training(0);
    Trainer gpu = mixed_trainer(o);
    const Judgement before = cpu.judge(), before_there = gpu.judge();
    EXPECT_NEAR(before_there.kl, before.kl, 0.02 * before.kl);
    EXPECT_NEAR(before_there.active, before.active, 0.01);
    for (int step = 0; !cpu.done(); ++step) {
      const StepResult a = cpu.step(), b = gpu.step();
      EXPECT_NEAR(b.kl, a.kl, 0.02 * a.kl);
      EXPECT_NEAR(b.gradient_norm, a.gradient_norm, 0.03 * a.gradient_norm);
      EXPECT_GT(a.gradient_norm, o.clip);
      EXPECT_NEAR(b.auxiliary, a.auxiliary, 0.01 * a.auxiliary);
      if (step == 0) {
        EXPECT_NEAR(a.auxiliary, 1, 0.5);
      }
    }
    const std::vector<float> a = state(cpu), b = state(gpu);
    ASSERT_EQ(a.size(), b.size());
    EXPECT_LT(relative_difference(b, a), 0.02);
    // Adam takes gradients of any scale alike: what was clipped shows in the moments.
    const ScratchFolder folder;
    cpu.save(folder.path / "cpu.gguf", "");
    gpu.save(folder.path / "gpu.gguf", "");
    for (const char* name : {"blk.0.up.m", "blk.1.down.m", "blk.1.router_v.m", "blk.2.router_u.m",
                             "blk.2.router_bias.m", "blk.2.bypass_p.m"}) {
      const auto moments = [&](const char* file) {
        const auto saved = models::GgufFile::open(folder.path / file);
        const auto* tensor = saved->find_tensor(name);
        std::vector<float> values(static_cast<std::size_t>(tensor->dims[0]));
        std::memcpy(values.data(), tensor->data, values.size() * sizeof(float));
        return values;
      };
      EXPECT_LT(relative_difference(moments("gpu.gguf"), moments("cpu.gguf")), 0.05) << name;
    }
  }
}

// Trained in one go, and cut after the first step and later; on the same stream of roundings.
TEST_F(CudaTrainer, SavedAndLoadedGoesOnBitForBit) {
  for (const Learns learns : {Learns::Weights, Learns::Scales}) {
    const RecoverOptions o = options(true);
    Trainer whole = mixed_trainer(o, learns);
    const ScratchFolder folder;
    const auto file = folder.path / "training.gguf";
    for (int step = 0; !whole.done(); ++step) {
      whole.step();
      if (step == 1) whole.save(file, "a note");
    }
    Trainer second = mixed_trainer(o, learns);
    second.step();  // is forgotten
    EXPECT_EQ(second.load(file), "a note");
    EXPECT_EQ(second.step_index(), 2);
    second.judge();  // changes nothing
    while (!second.done()) second.step();
    const std::vector<float> a = state(whole), b = state(second);
    ASSERT_EQ(a.size(), b.size());
    EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)), 0);
  }
}

// What is changed in the host's model is what the next step, or judgement, is of.
TEST_F(CudaTrainer, ModelIsOneOnBothSides) {
  Trainer gpu = trainer(options(true));
  const double before = gpu.judge().kl;
  gpu.step();
  const std::vector<float> trained = state(gpu);
  const double after = gpu.judge().kl;
  EXPECT_NE(after, before);
  for (auto& c : gpu.model().converted()) {
    for (const auto& t : c.tensors()) std::fill(t.value.begin(), t.value.end(), 0.0F);
  }
  EXPECT_NE(gpu.judge().kl, after);
  EXPECT_NE(state(gpu), trained);
}

TEST_F(CudaTrainer, NanIsAnErrorAndNoStep) {
  const auto fails = [&](Trainer& gpu, std::span<float> values) {
    std::fill(values.begin(), values.end(), std::numeric_limits<float>::quiet_NaN());
    const std::vector<float> before = state(gpu);
    try {
      gpu.step();
      FAIL() << "no error";
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find("step 2"), std::string::npos) << e.what();
    }
    const std::vector<float> after = state(gpu);
    EXPECT_EQ(std::memcmp(before.data(), after.data(), before.size() * sizeof(float)), 0);
  };
  Trainer routed = trainer(options(true));
  routed.step();
  fails(routed, routed.model().converted()[1].self_routed()->parameters->w_up.span());
  // A router's gradient alone: scores that are NaN choose the same experts for all.
  Trainer behind_routers = mixed_trainer(options(true));
  behind_routers.step();
  fails(behind_routers, behind_routers.model().converted()[2].moe()->parameters->router_u.span());
}

TEST_F(CudaTrainer, NamesWhatItDoesNotTrain) {
  const auto refused = [&](const RecoverOptions& o, const std::string& why) {
    try {
      trainer(o);
      FAIL() << "no error";
    } catch (const InputError& e) {
      EXPECT_NE(std::string(e.what()).find(why), std::string::npos) << e.what();
    }
  };
  RecoverOptions o = options(true);
  o.refit_every = 10;
  refused(o, "routers are refitted on the CPU alone (--refit-every)");
  o.attention_rank = 4;
  refused(o, "the attention learns on the CPU alone");
  // A teacher that is a hybrid itself.
  EXPECT_THROW(Trainer(mixed.load(), *mixed.load(), lent.ctx, tokens, options(true)), InputError);
}

}  // namespace
}  // namespace moesaic::converter
