// Streams on a GPU against the CPU's, layer by layer, and what is measured on them.

#include "converter/cuda/passes.h"

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "converter/divergence.h"
#include "converter/self_routed/apply_plan.h"
#include "converter/self_routed/curves.h"
#include "converter/sensitivity.h"
#include "kernels/base/error.h"
#include "tests/converter/recovery/self_routed_model.h"
#include "tests/converter/relative_difference.h"
#include "tests/kernels/cuda/device.h"
#include "tests/models/tiny_model.h"

namespace moesaic::converter {
namespace {

using models::TinyModel;
using models::TinyOptions;

constexpr std::int64_t kContext = 8;
constexpr std::int64_t kRows = 3 * kContext;  // of a pass

// One model on both sides.
struct Both {
  explicit Both(const TinyModel& file)
      : model(file.load(), test.context),
        host(model),
        device(cuda_passes(0, kRows)(model, kContext)) {}

  models::TestContext test{2, Activations::BF16};
  models::Transformer model;
  HostPasses host;
  std::unique_ptr<Passes> device;
};

// Rows on the host, and matrices of them.
struct Rows {
  explicit Rows(std::int64_t n) : r(elements(n)), x(r.size()), y(r.size()), n(n) {}
  static std::size_t elements(std::int64_t n) {
    return static_cast<std::size_t>(n * TinyModel::kModel);
  }
  Matrix view(std::vector<float>& v) const { return {v.data(), n, TinyModel::kModel}; }
  MlpRows all() { return {view(r), view(x), view(y)}; }
  std::vector<float> r, x, y;
  std::int64_t n;
};

std::vector<float> rows_of(Stream& stream) {
  Rows rows(stream.n_tokens());
  stream.read(0, rows.view(rows.r));
  return rows.r;
}

// Thresholds that leave about half of everything.
struct Routed {
  Routed(const models::Mlp& mlp, bool up_by_input)
      : input(TinyModel::kModel, 0.5F), gate(TinyModel::kFf, 0.15F), hidden(gate.size(), 0.08F) {
    const auto& dense = std::get<models::DenseMlp>(mlp);
    if (up_by_input) gate.clear();
    input[3] = 0;
    hidden[5] = std::numeric_limits<float>::infinity();
    view = {.phi = dense.phi,
            .up_by_input = up_by_input,
            .w_gate = dense.w_gate,
            .w_up = dense.w_up,
            .w_down = dense.w_down,
            .input_threshold = input,
            .gate_threshold = gate,
            .hidden_threshold = hidden};
  }
  std::vector<float> input, gate, hidden;
  kernels::SelfRoutedView view;
};

class CudaPassesTest : public cuda::OnDevice, public testing::WithParamInterface<TinyOptions> {};

// Both sides round the same operands to bfloat16; sums differ in their last bits, which now and
// then moves an operand to its neighbour, 2⁻⁸ away. Across a threshold it moves an input of .5 in a
// row of length 8: a sixteenth of that row.
constexpr double kRounded = 0.01, kAcrossThreshold = 0.04;

TEST_P(CudaPassesTest, StreamsEqualTheHosts) {
  const TinyModel file(GetParam());
  Both both(file);
  const auto tolerance = [](int layer) { return layer < 1 ? kRounded : kAcrossThreshold; };
  // Less than a pass, whole ones, and a rest.
  for (const std::int64_t n_windows : {1, 6, 5}) {
    const auto tokens = models::random_ids(static_cast<std::size_t>(n_windows * kContext));
    const auto a = both.host.stream(tokens, kContext), b = both.device->stream(tokens, kContext);
    EXPECT_EQ(b->n_tokens(), n_windows * kContext);
    EXPECT_EQ(rows_of(*b), rows_of(*a));  // embeddings
    for (int layer = 0; layer < GetParam().n_layers; ++layer) {
      SCOPED_TRACE(fmt::format("{} windows, layer {}", n_windows, layer));
      a->attention(layer);
      b->attention(layer);
      EXPECT_LT(relative_difference(rows_of(*b), rows_of(*a)), tolerance(layer - 1));
      Rows found(b->n_tokens()), expected(found.n);
      a->mlp_rows(layer, expected.all());
      b->mlp_rows(layer, found.all());
      EXPECT_EQ(found.r, rows_of(*b));
      EXPECT_LT(relative_difference(found.x, expected.x), tolerance(layer - 1));
      EXPECT_LT(relative_difference(found.y, expected.y), tolerance(layer - 1));
      // Of some rows, those; and without what is not wanted.
      Rows some(7);
      b->mlp_rows(layer, some.all());
      for (std::int64_t i = 0; i < some.n; ++i) {
        const std::size_t from = Rows::elements(i * found.n / some.n), to = Rows::elements(i);
        for (const auto& [part, all] : {std::pair{&some.r, &found.r}, {&some.x, &found.x}}) {
          EXPECT_EQ(std::memcmp(part->data() + to, all->data() + from, Rows::elements(1) * 4), 0);
        }
      }
      Rows inputs(b->n_tokens());
      b->mlp_rows(layer, {.x = inputs.view(inputs.x)});
      EXPECT_EQ(inputs.x, found.x);
      EXPECT_EQ(inputs.y, Rows(inputs.n).y);

      const models::Mlp& own = both.device->own_mlp(layer);
      const Routed routed(own, layer == 2);
      const models::Mlp mlp = layer == 0 ? own : models::Mlp(routed.view);
      a->mlp(layer, mlp);
      b->mlp(layer, mlp);
      EXPECT_LT(relative_difference(rows_of(*b), rows_of(*a)), tolerance(layer));
    }
    // An output that is known.
    Rows y(b->n_tokens());
    for (std::size_t i = 0; i < y.y.size(); ++i) y.y[i] = std::sin(static_cast<float>(i));
    std::vector<float> same = y.y;
    a->add_mlp_output(1, y.view(y.y));
    b->add_mlp_output(1, {same.data(), y.n, TinyModel::kModel});
    EXPECT_LT(relative_difference(rows_of(*b), rows_of(*a)), tolerance(1));
    // Part of a stream, and a copy of it.
    const auto other = both.device->stream(tokens, kContext);
    other->assign(*b);
    EXPECT_EQ(rows_of(*other), rows_of(*b));
    Rows part(3);
    other->read(4, part.view(part.r));
    EXPECT_EQ(std::memcmp(part.r.data(), rows_of(*b).data() + Rows::elements(4), part.r.size() * 4),
              0);
  }
}

// 26 judged rows are a pass and a rest. Of two, one that a neuron is moved across a threshold of is
// half.
TEST_P(CudaPassesTest, DivergenceIsTheHosts) {
  const TinyModel file(GetParam());
  Both both(file);
  for (const std::int64_t n_windows : {1, 13}) {
    const auto tokens = models::random_ids(static_cast<std::size_t>(n_windows * kContext));
    Substitution host(both.host, tokens, kContext), device(*both.device, tokens, kContext);
    for (int layer = 0; layer < GetParam().n_layers; ++layer) {
      SCOPED_TRACE(fmt::format("{} windows, layer {}", n_windows, layer));
      host.attention(layer);
      device.attention(layer);
      const Routed routed(both.host.own_mlp(layer), layer == 1);
      const auto replaced = [&](Stream& stream) { stream.mlp(layer, routed.view); };
      const double expected = host.divergence(layer, replaced);
      EXPECT_GT(expected, 1e-3);
      EXPECT_NEAR(device.divergence(layer, replaced), expected,
                  (n_windows == 1 ? 0.1 : 0.03) * expected);
      // Of itself there is none beyond the roundings of the passes.
      const auto own = [&](Stream& stream) { stream.mlp(layer, both.host.own_mlp(layer)); };
      EXPECT_NEAR(device.divergence(layer, own), 0, 1e-5);
      host.pass(layer);
      device.pass(layer);
    }
    EXPECT_LT(relative_difference(rows_of(device.dense()), rows_of(host.dense())), kRounded);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Models, CudaPassesTest,
    testing::Values(TinyOptions{.n_layers = 3, .dtype = DType::Q8_0, .tied = false},
                    TinyOptions{
                        .architecture = "gemma3", .n_layers = 3, .window = 4, .tied = false}),
    [](const auto& info) { return info.param.architecture; });

class CudaPasses : public cuda::OnDevice {};

TEST_F(CudaPasses, LayersWithARouterRunOnTheHost) {
  const TinyModel file({.n_layers = 2, .tied = false});
  const TinyModel hybrid({.n_layers = 2, .moe_layers = {1}});
  Both both(file);
  const auto checkpoint = hybrid.load();
  const auto tokens = models::random_ids(7 * kContext);
  const auto a = both.host.stream(tokens, kContext), b = both.device->stream(tokens, kContext);
  for (const auto& stream : {a.get(), b.get()}) {
    stream->attention(1);
    stream->mlp(1, checkpoint->layers[1].mlp);
    // Another model's dense layer is not the one on the device.
    stream->mlp(0, checkpoint->layers[0].mlp);
  }
  EXPECT_LT(relative_difference(rows_of(*b), rows_of(*a)), kRounded);
}

TEST_F(CudaPasses, CurvesAndThresholdsAreTheHosts) {
  const TinyModel file({.n_layers = 2, .tied = false});
  Both both(file);
  engine::Monitor monitor;
  const auto tokens = models::random_ids(12 * kContext);
  const auto a = measure_curves(both.host, tokens, kContext, monitor);
  const auto b = measure_curves(*both.device, tokens, kContext, monitor);
  ASSERT_EQ(b.size(), a.size());
  for (std::size_t l = 0; l < a.size(); ++l) {
    for (std::size_t i = 0; i < a[l].measured.size(); ++i) {
      const auto &expected = a[l].measured[i], &found = b[l].measured[i];
      EXPECT_NEAR(found.fraction, expected.fraction, 0.05);
      EXPECT_NEAR(found.kl, expected.kl, 0.1 * expected.kl);
    }
  }
  RoutedPlan plan;
  plan.layers = {{{0.6, 0.5, 0.4}, 0.5, 0}, {}};
  std::vector<LayerReport> reports_a, reports_b;
  const auto t = apply_plan(both.host, plan, tokens, kContext, reports_a, monitor);
  const auto u = apply_plan(*both.device, plan, tokens, kContext, reports_b, monitor);
  EXPECT_LT(relative_difference(u[0].hidden, t[0].hidden), 0.01);
  EXPECT_NEAR(u[0].shares.gate, t[0].shares.gate, 1e-3);
  EXPECT_NEAR(reports_b[0].error_closed_form, reports_a[0].error_closed_form,
              0.02 * reports_a[0].error_closed_form);
}

TEST_F(CudaPasses, SensitivityIsTheHosts) {
  const TinyModel file({.n_layers = 2, .tied = false});
  Both both(file);
  engine::Monitor monitor;
  const auto tokens = models::random_ids(12 * kContext);
  LayerPlan plan;
  plan.n_shared = 16;
  plan.n_active = 32;
  plan.router_rank = 8;
  plan.bypass_rank = 4;
  const auto measure = [&](Passes& passes) {
    return measure_sensitivity(passes, tokens, kContext, plan, {true, false},
                               find_recipe("low-rank"), monitor);
  };
  const auto a = measure(both.host), b = measure(*both.device);
  EXPECT_GT(a[0], 0);
  EXPECT_NEAR(b[0], a[0], 0.1 * a[0]);
  EXPECT_EQ(b[1], 0);
}

std::string error_of(const std::function<void()>& run) {
  try {
    run();
  } catch (const FormatError& e) {
    return e.what();
  }
  return "";
}

TEST_F(CudaPasses, NanIsTheHostsError) {
  for (const char* name : {"blk.0.attn_q.weight", "blk.1.ffn_up.weight", "output.weight"}) {
    const TinyModel file({.n_layers = 2, .tied = false}, [&](TinyModel& m) {
      const float nan = std::numeric_limits<float>::quiet_NaN();
      std::memcpy(m.tensor(name).data.data() + 8, &nan, sizeof(nan));
    });
    Both both(file);
    engine::Monitor monitor;
    const auto tokens = models::random_ids(4 * kContext);
    const auto measure = [&](Passes& passes) {
      return error_of([&] { measure_curves(passes, tokens, kContext, monitor); });
    };
    const std::string expected = measure(both.host);
    EXPECT_NE(expected, "") << name;
    EXPECT_EQ(measure(*both.device), expected) << name;
  }
}

TEST_F(CudaPasses, NamesWhatDoesNotFit) {
  const TinyModel hybrid({.n_layers = 2, .moe_layers = {1}}), file({.n_layers = 1});
  models::TestContext test(1, Activations::BF16);
  models::Transformer model(hybrid.load(), test.context);
  EXPECT_THROW(cuda_passes(0)(model, kContext), InputError);
  Both both(file);
  const auto tokens = models::random_ids(2 * kContext);
  EXPECT_THROW(both.device->stream(tokens, 2 * kContext), ShapeError);
  EXPECT_THROW(both.device->stream(std::span(tokens).first(9), kContext), ShapeError);
}

// Read by steps.cmake: what ten layers take, and thirty.
class CudaPassesSteps : public CudaPasses {
 protected:
  static void run(int n) {
    const TinyModel file({.n_layers = 1});
    Both both(file);
    const auto tokens = models::random_ids(2 * kContext);
    const auto stream = both.device->stream(tokens, kContext);
    for (int i = 0; i < n; ++i) {
      stream->attention(0);
      stream->mlp(0, both.device->own_mlp(0));
    }
    rows_of(*stream);
  }
};
TEST_F(CudaPassesSteps, Ten) { run(10); }
TEST_F(CudaPassesSteps, Thirty) { run(30); }

// The same of layers that are calibrated: self-routed ones, rows to the host, a divergence.
class CudaCalibrationSteps : public CudaPasses {
 protected:
  static void run(int n) {
    const TinyModel file({.n_layers = 1});
    Both both(file);
    const auto tokens = models::random_ids(2 * kContext);
    const auto stream = both.device->stream(tokens, kContext);
    const auto other = both.device->stream(tokens, kContext);
    const Routed routed(both.device->own_mlp(0), false);
    Rows rows(stream->n_tokens());
    for (int i = 0; i < n; ++i) {
      stream->mlp_rows(0, rows.all());
      other->assign(*stream);
      other->mlp(0, routed.view);
      stream->divergence(*other);
    }
  }
};
TEST_F(CudaCalibrationSteps, Ten) { run(10); }
TEST_F(CudaCalibrationSteps, Thirty) { run(30); }

}  // namespace
}  // namespace moesaic::converter
