#include "kernels/mixture.h"

#include <gtest/gtest.h>

#include "kernels/base/error.h"
#include "kernels/quant.h"
#include "kernels/secret_moe.h"
#include "tests/kernels/mixture_layer.h"

namespace moesaic::kernels {
namespace {

std::vector<MixtureKind> all_kinds() {
  std::vector<MixtureKind> kinds;
  for (const ExpertKind e : {ExpertKind::Glu, ExpertKind::Gelu, ExpertKind::Linear}) {
    for (const RouterKind r : {RouterKind::LowRank, RouterKind::FullRank, RouterKind::ProductKey}) {
      for (const GateKind g : {GateKind::None, GateKind::Softmax, GateKind::Score}) {
        kinds.push_back({e, r, g});
      }
    }
  }
  return kinds;
}

std::string text(const MixtureOptions& o) {
  return fmt::format("expert {} router {} gate {} block {}", static_cast<int>(o.kind.expert),
                     static_cast<int>(o.kind.router), static_cast<int>(o.kind.gate), o.block);
}

class Mixture : public OnEachTarget {};
INSTANTIATE_TEST_SUITE_P(Targets, Mixture, every_target(), target_name);

TEST_P(Mixture, EqualsTheDefinitionForEveryKind) {
  for (const MixtureKind& kind : all_kinds()) {
    for (const std::int64_t block : {1, 4, 16}) {
      const MixtureOptions o = {
          .kind = kind, .d_model = 64, .n_experts = 16, .block = block, .n_active = 5};
      SCOPED_TRACE(text(o));
      const MixtureLayer layer(o);
      ASSERT_NO_THROW(check_shapes(layer.view));
      const std::vector<float> x = normal_values(size(4 * o.d_model), 20);
      Lender lender(2);
      const MixtureResult batch = run(lender, layer.view, x);
      expect_layer(layer.view, x, batch);
      // One token alone, with fewer tokens than threads: the same selection.
      const std::vector<float> alone(x.begin() + 3 * o.d_model, x.begin() + 4 * o.d_model);
      const MixtureResult one = run(lender, layer.view, alone);
      expect_layer(layer.view, alone, one);
      EXPECT_TRUE(std::equal(one.ids.begin(), one.ids.end(), batch.ids.begin() + 3 * o.n_active));
      EXPECT_EQ(batch.y, run(lender, layer.view, x).y) << "a second run differs";
    }
  }
}

TEST_P(Mixture, Edges) {
  const MixtureKind peer = {ExpertKind::Gelu, RouterKind::ProductKey, GateKind::Softmax};
  const MixtureKind sgatlin = {ExpertKind::Linear, RouterKind::ProductKey, GateKind::Score};
  const MixtureKind paper = {ExpertKind::Gelu, RouterKind::LowRank, GateKind::Softmax};
  const MixtureOptions edges[] = {
      {.kind = peer, .n_experts = 36, .n_active = 36},  // all of them
      {.kind = peer, .n_active = 0},                    // none
      {.kind = sgatlin, .n_shared = 0, .n_experts = 1, .n_active = 1, .bypass_rank = 0},
      {.kind = sgatlin, .n_experts = 0, .n_active = 0},  // shared alone
      {.kind = paper, .n_shared = 0, .n_experts = 1, .n_active = 1},
      {.kind = paper, .n_experts = 36, .n_active = 36, .means = false},
      {.kind = paper, .n_experts = 400, .n_active = 50},  // more experts than d_model
      {.kind = peer, .n_experts = 400, .n_active = 50},   // k beyond the keys of a half
      {.kind = {}, .n_experts = 3, .block = 16, .n_active = 2},
      {.kind = {ExpertKind::Glu, RouterKind::FullRank, GateKind::Score},
       .experts = DType::F32,
       .router = DType::F16,
       .d_model = 45,
       .block = 4,
       .bypass_rank = 2},
      {.kind = peer,
       .experts = DType::BF16,
       .router = DType::F32,
       .d_model = 33,
       .router_rank = 3,
       .bypass_rank = 1},
      {.kind = sgatlin, .experts = DType::Q4_1},
      {.kind = paper, .experts = DType::Q4_0, .router = DType::BF16},
  };
  for (const MixtureOptions& o : edges) {
    const MixtureLayer layer(o);
    for (const int n_threads : {1, 2, 3, 4}) {
      for (const std::int64_t n_tokens : {1, 5}) {
        SCOPED_TRACE(testing::Message() << "edge " << (&o - edges) << " threads " << n_threads
                                        << " tokens " << n_tokens);
        const std::vector<float> x = normal_values(size(n_tokens * o.d_model), 10);
        Lender lender(n_threads);
        expect_layer(layer.view, x, run(lender, layer.view, x));
      }
    }
  }
}

TEST_P(Mixture, EmptyBatch) {
  const MixtureLayer layer({});
  Lender lender(2);
  EXPECT_TRUE(run(lender, layer.view, {}).y.empty());
  EXPECT_EQ(lender.tally.total(), 0);
}

TEST_P(Mixture, LongBatchInChunks) {
  const MixtureLayer layer({.kind = {ExpertKind::Linear, RouterKind::ProductKey, GateKind::Score},
                            .d_model = 32,
                            .n_experts = 16,
                            .n_active = 3});
  const std::vector<float> x = normal_values(1100 * 32, 10);
  Lender lender(2);
  expect_layer(layer.view, x, run(lender, layer.view, x));
}

TEST_P(Mixture, TiesPickLowestId) {
  for (const RouterKind router :
       {RouterKind::LowRank, RouterKind::FullRank, RouterKind::ProductKey}) {
    MixtureLayer layer({.kind = {ExpertKind::Linear, router, GateKind::Softmax}});
    // Without a router's say, all experts are equal.
    const std::vector<float> no_bias(layer.view.router_bias.size(), 0.5f);
    layer.view.router_bias = no_bias;
    const std::vector<float> x(3 * 96, 0.0f);
    Lender lender(2);
    const MixtureResult r = run(lender, layer.view, x);
    for (std::size_t i = 0; i < r.ids.size(); ++i) {
      EXPECT_EQ(r.ids[i], static_cast<std::int32_t>(i % 7));
    }
  }
}

TEST_P(Mixture, NanInputSelectsValidIds) {
  for (const MixtureKind& kind : all_kinds()) {
    const MixtureLayer layer({.kind = kind});
    std::vector<float> x = normal_values(4 * 96, 10);
    x[2 * 96 + 7] = kNan;
    x[3 * 96 + 1] = kInf;
    const std::vector<float> clean(x.begin(), x.begin() + 2 * 96);
    Lender lender(2);
    const MixtureResult r = run(lender, layer.view, x);
    for (std::size_t t = 0; t < 4; ++t) {
      for (std::size_t j = 0; j < 7; ++j) {
        const std::int32_t id = r.ids[t * 7 + j];
        EXPECT_GE(id, j == 0 ? 0 : r.ids[t * 7 + j - 1] + 1);
        EXPECT_LT(id, 36);
      }
    }
    expect_layer(layer.view, clean,
                 {{r.y.begin(), r.y.begin() + 2 * 96}, {r.ids.begin(), r.ids.begin() + 14}});
  }
}

TEST_P(Mixture, Bf16Activations) {
  for (const MixtureKind& kind : all_kinds()) {
    const MixtureLayer layer({.kind = kind});
    std::vector<float> x = normal_values(5 * 96, 10);
    for (float& v : x) v = bf16_to_f32(f32_to_bf16(v));
    Lender lender(2);
    lender.ctx.activations = Activations::BF16;
    // Operands of two products in a row are rounded to eight bits, an error of 2⁻⁹ each.
    expect_layer(layer.view, x, run(lender, layer.view, x), 4 * 0x1p-9);
  }
}

// The fused kernels of "glu + low_rank + none" and the general layer are one and the same.
TEST_P(Mixture, SecretMoeIsASpecialCase) {
  const MixtureLayer layer({.kind = {}, .experts = DType::Q4_1});
  const MixtureView& v = layer.view;
  const SecretMoeView fused = {.phi = v.phi,
                               .n_active = v.n_active,
                               .shared = v.shared,
                               .experts = v.experts,
                               .expert_mean = v.expert_mean,
                               .router_v = v.router_v,
                               .router_u = v.router_u,
                               .router_bias = v.router_bias,
                               .bypass_q = v.bypass_q,
                               .bypass_p = v.bypass_p,
                               .bias = v.bias};
  const std::vector<float> x = normal_values(6 * 96, 10);
  Lender lender(2);
  const MixtureResult found = run(lender, v, x);
  MixtureResult other{std::vector<float>(x.size()), std::vector<std::int32_t>(6 * 7)};
  secret_moe(lender.ctx, fused, {x.data(), 6, 96}, {other.y.data(), 6, 96}, MoePath::Gather,
             other.ids);
  EXPECT_EQ(found.ids, other.ids);
  expect_layer(v, x, other);
}

TEST_P(Mixture, TallyIsExactlyTheBytesRead) {
  for (const MixtureKind& kind : all_kinds()) {
    const MixtureOptions o = {.kind = kind, .block = 4};
    SCOPED_TRACE(text(o));
    const MixtureLayer layer(o);
    const MixtureView& v = layer.view;
    const std::int64_t expert_bytes = v.experts.bytes() / o.n_experts;
    for (const std::int64_t n_tokens : {1, 6}) {
      const std::vector<float> x = normal_values(size(n_tokens * 96), 10);
      Lender lender(2);
      run(lender, v, x);
      EXPECT_EQ(lender.tally.bytes(Traffic::Router),
                v.router_v.bytes() + v.router_u.bytes() + v.bypass_q.bytes() + v.bypass_p.bytes());
      EXPECT_EQ(lender.tally.bytes(Traffic::Experts),
                n_tokens * (v.shared.bytes() + o.n_active * expert_bytes));
      EXPECT_EQ(lender.tally.total(),
                lender.tally.bytes(Traffic::Router) + lender.tally.bytes(Traffic::Experts));
    }
  }
}

TEST(MixtureWork, CountsEveryPart) {
  const auto count = [](const MixtureOptions& o) { return multiply_adds(MixtureLayer(o).view); };
  const std::int64_t bypass = 2 * 32 * 96;
  EXPECT_EQ(count({}), 32 * (96 + 36) + bypass + 3 * 96 * (5 + 7));
  EXPECT_EQ(count({.kind = {ExpertKind::Gelu, RouterKind::LowRank, GateKind::Softmax}}),
            32 * (96 + 36) + bypass + 2 * 96 * (5 + 7) + 7);
  EXPECT_EQ(
      count({.kind = {ExpertKind::Gelu, RouterKind::FullRank, GateKind::Softmax}, .block = 4}),
      96 * 36 + bypass + 2 * 96 * (5 + 28) + 28);
  // 6 keys a half, each of 32, behind two queries of 32.
  EXPECT_EQ(count({.kind = {ExpertKind::Linear, RouterKind::ProductKey, GateKind::Score},
                   .bypass_rank = 0}),
            2 * 32 * 96 + 2 * 6 * 32 + 2 * 96 * (5 + 7) + 7);
}

TEST(MixtureWorkspace, SteadyStateAllocatesNothing) {
  const MixtureLayer layer({.kind = {ExpertKind::Gelu, RouterKind::ProductKey, GateKind::Softmax}});
  const std::vector<float> x = normal_values(96, 10);
  Lender lender(2);
  run(lender, layer.view, x);
  const std::size_t capacity = lender.workspace.capacity();
  run(lender, layer.view, x);
  EXPECT_EQ(lender.workspace.capacity(), capacity);
}

template <class Change>
void expect_shape_error(const MixtureKind& kind, Change&& change, std::string_view part) {
  MixtureLayer layer({.kind = kind});
  change(layer.view);
  try {
    check_shapes(layer.view);
    FAIL() << "no error for " << part;
  } catch (const ShapeError& e) {
    EXPECT_NE(std::string_view(e.what()).find(part), std::string_view::npos) << e.what();
  }
}

TEST(MixtureShape, ErrorsNameThePart) {
  const MixtureKind glu = {};
  const MixtureKind peer = {ExpertKind::Gelu, RouterKind::ProductKey, GateKind::Softmax};
  const MixtureKind full = {ExpertKind::Linear, RouterKind::FullRank, GateKind::Score};
  using View = MixtureView;
  expect_shape_error(
      glu, [](View& v) { v.n_active = 37; }, "n_active is 37, expected 0 to 36");
  expect_shape_error(
      glu, [](View& v) { v.bias = {}; }, "bias");
  expect_shape_error(
      glu, [](View& v) { v.block = 0; }, "blocks of 0 neurons");
  expect_shape_error(
      glu, [](View& v) { v.experts.rows -= 1; }, "experts has 107 rows");
  expect_shape_error(
      glu, [](View& v) { v.shared.cols = 64; }, "shared is [15, 64]");
  expect_shape_error(
      glu, [](View& v) { v.experts.dtype = DType::Q4_K; }, "Q4_K");
  expect_shape_error(
      glu, [](View& v) { v.expert_mean = v.expert_mean.first(3); },
      "mean has 3 elements, expected 36");
  expect_shape_error(
      glu, [](View& v) { v.router_bias = {}; }, "router bias");
  expect_shape_error(
      glu, [](View& v) { v.router_v.cols = 32; }, "router V");
  expect_shape_error(
      glu, [](View& v) { v.bypass_q = {}; }, "bypass");
  expect_shape_error(
      peer, [](View& v) { v.expert_bias = {}; }, "expert bias has 0 elements, expected 36");
  expect_shape_error(
      peer, [](View& v) { v.shared_bias = v.shared_bias.first(1); }, "shared bias");
  expect_shape_error(
      peer, [](View& v) { v.experts.rows -= 2; }, "35 experts behind product keys");
  expect_shape_error(
      peer, [](View& v) { v.router_v.rows = 32; }, "router V is [32, 96]");
  expect_shape_error(
      peer, [](View& v) { v.router_u.rows = 11; }, "router U is [11, 32]");
  expect_shape_error(
      full, [](View& v) { v.router_v.rows = 1; }, "none at full rank");
  expect_shape_error(
      full, [](View& v) { v.router_u.cols = 32; }, "rows of 32, expected 96");
}

TEST(MixtureShape, BatchMustFit) {
  const MixtureLayer layer({});
  std::vector<float> x(96 * 2), y(96 * 2);
  std::vector<std::int32_t> ids(7);
  Lender lender;
  EXPECT_THROW(mixture(lender.ctx, layer.view, {x.data(), 2, 95}, {y.data(), 2, 96}), ShapeError);
  EXPECT_THROW(mixture(lender.ctx, layer.view, {x.data(), 2, 96}, {y.data(), 2, 96}, ids),
               ShapeError);
}

}  // namespace
}  // namespace moesaic::kernels
