#include "models/mixture_file.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <set>

#include "engine/kv_cache.h"
#include "kernels/base/error.h"
#include "models/expert_usage.h"
#include "models/secret_moe_file.h"
#include "tests/models/expect_same.h"
#include "tests/models/gguf_bytes.h"
#include "tests/models/mixture_case.h"
#include "tests/models/tiny_mixture.h"

namespace moesaic::models {
namespace {

using kernels::ExpertKind;
using kernels::GateKind;
using kernels::MixtureKind;
using kernels::MixtureView;
using kernels::RouterKind;
using testing::contains;
using testing::ends_with;
using testing::error_of;
using testing::TempFolder;

constexpr MixtureKind kPeer = {ExpertKind::Gelu, RouterKind::ProductKey, GateKind::Softmax};
constexpr MixtureKind kSgatlin = {ExpertKind::Linear, RouterKind::ProductKey, GateKind::Score};
constexpr MixtureKind kPaper = {ExpertKind::Gelu, RouterKind::LowRank, GateKind::Softmax};
constexpr MixtureKind kFull = {ExpertKind::Glu, RouterKind::FullRank, GateKind::None};

GgufWriter writer_for(const std::string& kind, std::uint64_t n_active = 2) {
  GgufWriter w;
  w.set(std::string(kKeyFormatVersion), GgufValue::u32(kSecretMoeFormatVersion));
  w.set(std::string(kKeyLayerKind), GgufValue::string_array({"dense", kind}));
  w.set(std::string(kKeyLayerActive), GgufValue::u32_array({0, n_active}));
  return w;
}

class MixtureFile : public ::testing::Test {
 protected:
  MixtureFile() {
    config_.n_layers = 2;
    config_.d_model = 64;
    config_.phi = kernels::Activation::GeluTanh;
  }

  std::shared_ptr<const GgufFile> reopen(const GgufWriter& w) {
    const std::filesystem::path path = folder_.path() / "hybrid.gguf";
    w.write(path);
    return GgufFile::open(path);
  }

  TempFolder folder_;
  ModelConfig config_;
};

TEST(MixtureKinds, NamesAreTakenBack) {
  std::set<std::string> names;
  for (const ExpertKind e : {ExpertKind::Glu, ExpertKind::Gelu, ExpertKind::Linear}) {
    for (const RouterKind r : {RouterKind::LowRank, RouterKind::FullRank, RouterKind::ProductKey}) {
      for (const GateKind g : {GateKind::None, GateKind::Softmax, GateKind::Score}) {
        const MixtureKind kind{e, r, g};
        EXPECT_EQ(mixture_kind(kind_name(kind)), kind);
        names.insert(kind_name(kind));
      }
    }
  }
  EXPECT_EQ(names.size(), 27U);
  EXPECT_EQ(kind_name(kPeer), "gelu+product_key+softmax");
  EXPECT_EQ(kind_name(kSgatlin), "linear+product_key+score");
  for (const char* other :
       {"", "dense", "glu+low_rank", "gelu+low_rank", "gelu+low_rank+softmax+"}) {
    EXPECT_FALSE(mixture_kind(other)) << other;
  }
}

TEST_F(MixtureFile, ComesBackAsItWas) {
  for (const MixtureKind& kind : {kPeer, kSgatlin, kPaper, kFull}) {
    for (const std::int64_t block : {1, 4}) {
      for (const bool extras : {false, true}) {
        SCOPED_TRACE(fmt::format("{} block {} extras {}", kind_name(kind), block, extras));
        const PackedMixture p = packed_mixture(kind, block, 64, extras);
        ASSERT_NO_THROW(kernels::check_shapes(p.view()));
        GgufWriter w = writer_for(kind_name(kind));
        p.add_to(w, 1);
        const auto file = reopen(w);
        EXPECT_TRUE(is_hybrid(*file));
        EXPECT_FALSE(read_mixture(*file, config_, 0));
        EXPECT_FALSE(read_secret_moe(*file, config_, 1));
        const auto found = read_mixture(*file, config_, 1);
        ASSERT_TRUE(found);
        const MixtureView expected = p.view();
        EXPECT_EQ(found->kind, kind);
        EXPECT_EQ(found->block, block);
        EXPECT_EQ(found->n_active, 2);
        EXPECT_EQ(found->n_experts(), 9);
        expect_same(found->shared, expected.shared);
        expect_same(found->experts, expected.experts);
        expect_same(found->shared_bias, expected.shared_bias);
        expect_same(found->expert_bias, expected.expert_bias);
        expect_same(found->expert_mean, expected.expert_mean);
        expect_same(found->router_v, expected.router_v);
        expect_same(found->router_u, expected.router_u);
        expect_same(found->router_bias, expected.router_bias);
        expect_same(found->bypass_q, expected.bypass_q);
        expect_same(found->bypass_p, expected.bypass_p);
        expect_same(found->bias, expected.bias);
        EXPECT_NO_THROW(kernels::check_shapes(*found));
        // One expert is one contiguous read.
        const std::int64_t c = kernels::rows_per_neuron(kind.expert);
        EXPECT_EQ(file->find_tensor("blk.1.moe.experts.weight")->dims,
                  (std::vector<std::int64_t>{9, c, block, 64}));
      }
    }
  }
}

TEST_F(MixtureFile, UnknownKindsListTheKnown) {
  GgufWriter w = writer_for("gelu+hash+softmax");
  const PackedMixture p = packed_mixture(kPeer);
  p.add_to(w, 1);
  const auto file = reopen(w);
  const std::string error = error_of<FormatError>([&] { read_mixture(*file, config_, 1); });
  EXPECT_PRED2(contains, error,
               "layer 1 is of kind \"gelu+hash+softmax\", expected one of dense, ");
  EXPECT_PRED2(ends_with, error,
               "or EXPERT+ROUTER+GATE of glu|gelu|linear, low_rank|full_rank|product_key, "
               "none|softmax|score");
}

struct Part {
  std::string name;
  DType dtype;
  std::vector<std::int64_t> dims;
  std::vector<std::byte> data;
};

TEST_F(MixtureFile, MissingOrMisshapenTensorsAreNamed) {
  for (const MixtureKind& kind : {kPeer, kSgatlin, kPaper, kFull}) {
    const PackedMixture p = packed_mixture(kind, 4);
    GgufWriter whole = writer_for(kind_name(kind));
    p.add_to(whole, 1);
    const auto source = reopen(whole);
    std::vector<Part> parts;
    for (const GgufTensor& t : source->tensors()) {
      parts.push_back({t.name, t.dtype, t.dims, {t.data, t.data + t.bytes}});
    }
    const auto read = [&](const std::vector<Part>& changed) {
      GgufWriter w = writer_for(kind_name(kind));
      for (const Part& part : changed) w.add_tensor(part.name, part.dtype, part.dims, part.data);
      const auto file = reopen(w);
      return error_of<FormatError>([&] { read_mixture(*file, config_, 1); });
    };
    EXPECT_EQ(read(parts), "nothing thrown");
    for (std::size_t i = 0; i < parts.size(); ++i) {
      SCOPED_TRACE(kind_name(kind) + " " + parts[i].name);
      std::vector<Part> without = parts;
      without.erase(without.begin() + static_cast<std::ptrdiff_t>(i));
      const bool optional =
          parts[i].name == "blk.1.moe.shared.weight" || parts[i].name == "blk.1.moe.experts.mean";
      if (optional) {
        EXPECT_EQ(read(without), "nothing thrown");
      } else {
        EXPECT_PRED2(contains, read(without), parts[i].name);
      }
      // One row fewer than there should be: of the parts that say a size, another part is named.
      std::vector<Part> smaller = parts;
      Part& part = smaller[i];
      if (part.dims[0] < 2) continue;
      part.data.resize(part.data.size() / static_cast<std::size_t>(part.dims[0]) *
                       static_cast<std::size_t>(part.dims[0] - 1));
      --part.dims[0];
      const std::string error = read(smaller);
      const bool says_a_size =
          part.name == "blk.1.moe.shared.weight" && kind.expert != ExpertKind::Gelu;
      if (says_a_size) {
        EXPECT_EQ(error, "nothing thrown");
      } else {
        EXPECT_PRED2(contains, error, "blk.1.moe.");
      }
    }
  }
}

TEST_F(MixtureFile, ProductKeysNeedASquare) {
  PackedMixture p = packed_mixture(kSgatlin, 1, 64, false);
  p.n_experts = 8;
  p.experts = random_rows(p.expert_dtype, 2 * 8, 64, 2);
  GgufWriter w = writer_for(kind_name(kSgatlin));
  p.add_to(w, 1);
  const auto file = reopen(w);
  EXPECT_PRED2(ends_with, error_of<FormatError>([&] { read_mixture(*file, config_, 1); }),
               "blk.1.moe.experts.weight has 8 experts behind product keys, expected a square");
}

TEST_F(MixtureFile, ActiveExpertsAreFewerThanExperts) {
  GgufWriter w = writer_for(kind_name(kPeer), 10);
  const PackedMixture p = packed_mixture(kPeer);
  p.add_to(w, 1);
  const auto file = reopen(w);
  EXPECT_PRED2(ends_with, error_of<FormatError>([&] { read_mixture(*file, config_, 1); }),
               "moesaic.layer.n_active of layer 1 is 10, expected 0 to 9, the number of experts");
}

std::vector<float> logits_of(Transformer& model, const std::vector<std::int32_t>& ids) {
  const auto n = static_cast<std::int64_t>(ids.size());
  engine::HostKvCache cache(model.config().n_layers, 1, n, TinyModel::kKvHeads, 16);
  std::vector<std::int32_t> slots(ids.size(), 0), positions(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i) positions[i] = static_cast<std::int32_t>(i);
  std::vector<float> logits(ids.size() * TinyModel::kVocab);
  engine::Batch batch;
  batch.tokens = ids;
  batch.slots = slots;
  batch.positions = positions;
  batch.outputs = positions;
  model.forward(batch, cache, {logits.data(), n, TinyModel::kVocab});
  return logits;
}

// The same weights once as "glu+low_rank", once as the general form with single neurons.
TEST(MixtureModel, EqualsTheFusedLayer) {
  const TinyOptions options{.moe_layers = {1}};
  const TinyModel fused(options);
  const TinyModel general(options, [](TinyModel& m) {
    m.set("moesaic.layer.kind", GgufValue::string_array({"dense", "glu+low_rank+none"}));
    m.tensor("blk.1.moe.experts.weight").dims = {TinyModel::kExperts, 3, 1, TinyModel::kModel};
    m.tensor("blk.1.moe.experts.mean").dims = {TinyModel::kExperts, 1};
  });
  TestContext test;
  Transformer a(fused.load(), test.context), b(general.load(), test.context);
  ASSERT_TRUE(std::holds_alternative<MixtureView>(b.checkpoint().layers[1].mlp));
  EXPECT_EQ(multiply_adds(a.checkpoint().layers[1].mlp),
            multiply_adds(b.checkpoint().layers[1].mlp));
  EXPECT_EQ(a.checkpoint().active_fraction(), b.checkpoint().active_fraction());
  const auto ids = random_ids(20);
  const std::vector<float> x = logits_of(a, ids), y = logits_of(b, ids);
  for (std::size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(x[i], y[i], 1e-4) << i;

  engine::Monitor monitor;
  EXPECT_EQ(count_experts(a, ids, 16, monitor).counts, count_experts(b, ids, 16, monitor).counts);
  std::vector<ExpertId> experts;
  for (std::int64_t e = 0; e < TinyModel::kExperts; ++e) experts.push_back({1, e});
  const auto first = strongest_firings(a, ids, 16, experts, 4, monitor);
  const auto second = strongest_firings(b, ids, 16, experts, 4, monitor);
  for (std::size_t e = 0; e < experts.size(); ++e) {
    ASSERT_EQ(first[e].size(), second[e].size());
    for (std::size_t i = 0; i < first[e].size(); ++i) {
      EXPECT_EQ(first[e][i].place, second[e][i].place);
      EXPECT_NEAR(first[e][i].contribution, second[e][i].contribution, 1e-4);
    }
  }
}

// Every kind runs in a model, and tells who watches what it selected.
TEST(MixtureModel, RunsEveryKind) {
  for (const MixtureKind& kind : {kPeer, kSgatlin, kPaper, kFull}) {
    const TinyModel tiny = tiny_mixture(packed_mixture(kind, 2));
    TestContext test;
    Transformer model(tiny.load(), test.context);
    std::size_t n_selected = 0;
    model.set_selection_observer([&](int layer, std::int64_t n, std::span<const std::int32_t> ids) {
      EXPECT_EQ(layer, 1);
      EXPECT_EQ(ids.size(), static_cast<std::size_t>(2 * n));
      n_selected += ids.size();
    });
    const auto ids = random_ids(9);
    test.tally.reset();
    for (const float v : logits_of(model, ids)) ASSERT_TRUE(std::isfinite(v));
    EXPECT_EQ(n_selected, 18U);
    EXPECT_DOUBLE_EQ(test.tally.active_fraction(), model.checkpoint().active_fraction());
    engine::Monitor monitor;
    const ExpertId id{1, 4};
    const auto firings = strongest_firings(model, ids, 9, {&id, 1}, 9, monitor)[0];
    EXPECT_EQ(static_cast<std::int64_t>(firings.size()),
              count_experts(model, ids, 9, monitor).counts[1][4]);
  }
}

}  // namespace
}  // namespace moesaic::models
