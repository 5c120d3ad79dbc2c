#include "kernels/secret_moe.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <optional>
#include <set>

#include "kernels/base/error.h"
#include "kernels/quant.h"
#include "tests/kernels/moe_layer.h"

namespace moesaic::kernels {
namespace {

constexpr MoePath kPaths[] = {MoePath::Gather, MoePath::Grouped, MoePath::Masked, MoePath::Auto};

class SecretMoe : public OnEachTarget {};
INSTANTIATE_TEST_SUITE_P(Targets, SecretMoe, every_target(), target_name);

TEST_P(SecretMoe, EveryPathAndFormatEqualsReference) {
  for (const DTypeTraits& t : kDTypes) {
    if (!can_quantize(t.dtype)) continue;
    MoeLayer layer({.experts = t.dtype, .router = t.dtype});
    for (const Activation phi : {Activation::Silu, Activation::GeluTanh}) {
      layer.view.phi = phi;
      for (const std::int64_t n_tokens : {1, 6, 19}) {
        const std::vector<float> x = normal_values(size(n_tokens * 96), 10);
        Lender lender(2);
        const MoeResult first = run(lender, layer.view, x, MoePath::Gather);
        for (const MoePath path : kPaths) {
          SCOPED_TRACE(testing::Message()
                       << t.name << " tokens " << n_tokens << " path " << static_cast<int>(path));
          const MoeResult r = run(lender, layer.view, x, path);
          EXPECT_EQ(r.ids, first.ids);
          expect_layer(layer.view, x, r);
        }
      }
    }
  }
}

TEST_P(SecretMoe, KFormats) {
  for (const DType dtype : {DType::Q4_K, DType::Q5_K, DType::Q6_K}) {
    const MoeLayer layer({.experts = dtype, .router = DType::Q8_0, .d_model = 512});
    const std::vector<float> x = normal_values(3 * 512, 10, 0.1f);
    Lender lender(2);
    for (const MoePath path : kPaths) {
      expect_layer(layer.view, x, run(lender, layer.view, x, path));
    }
  }
}

TEST_P(SecretMoe, Edges) {
  const MoeOptions edges[] = {
      {.n_active = 0},
      {.n_active = 40},
      {.n_shared = 0},
      {.bypass_rank = 0},
      {.n_shared = 1, .n_experts = 1, .n_active = 1},
      {.n_shared = 0, .n_experts = 1, .n_active = 0},
      {.n_shared = 7, .n_experts = 0, .n_active = 0},
      {.n_shared = 0, .n_experts = 200, .n_active = 130},
      {.experts = DType::F32,
       .router = DType::F16,
       .d_model = 45,
       .router_rank = 3,
       .bypass_rank = 2},
  };
  for (const MoeOptions& o : edges) {
    const MoeLayer layer(o);
    for (const int n_threads : {1, 2, 3, 4}) {
      for (const std::int64_t n_tokens : {1, 5}) {
        const std::vector<float> x = normal_values(size(n_tokens * o.d_model), 10);
        Lender lender(n_threads);
        const MoeResult first = run(lender, layer.view, x, MoePath::Gather);
        for (const MoePath path : kPaths) {
          SCOPED_TRACE(testing::Message()
                       << "edge " << (&o - edges) << " threads " << n_threads << " tokens "
                       << n_tokens << " path " << static_cast<int>(path));
          const MoeResult r = run(lender, layer.view, x, path);
          EXPECT_EQ(r.ids, first.ids);
          expect_layer(layer.view, x, r);
          EXPECT_EQ(r.y, run(lender, layer.view, x, path).y) << "a second run differs";
        }
      }
    }
  }
}

TEST_P(SecretMoe, EmptyBatch) {
  const MoeLayer layer({});
  Lender lender(2);
  for (const MoePath path : kPaths) {
    EXPECT_TRUE(run(lender, layer.view, {}, path).y.empty());
    EXPECT_EQ(lender.tally.total(), 0);
  }
}

TEST_P(SecretMoe, LongBatchInChunks) {
  const MoeLayer layer({.d_model = 32, .n_experts = 20, .n_active = 3});
  const std::vector<float> x = normal_values(1100 * 32, 10);
  Lender lender(2);
  const MoeResult first = run(lender, layer.view, x, MoePath::Gather);
  for (const MoePath path : {MoePath::Grouped, MoePath::Masked}) {
    const MoeResult r = run(lender, layer.view, x, path);
    EXPECT_EQ(r.ids, first.ids);
    expect_layer(layer.view, x, r);
  }
}

TEST_P(SecretMoe, TiesPickLowestId) {
  MoeLayer layer({});
  // Without a router's say, all experts are equal.
  const std::vector<float> no_bias(40, 0.5f);
  layer.view.router_bias = no_bias;
  const std::vector<float> x(3 * 96, 0.0f);
  Lender lender(2);
  for (const MoePath path : kPaths) {
    const MoeResult r = run(lender, layer.view, x, path);
    for (std::size_t i = 0; i < r.ids.size(); ++i) {
      EXPECT_EQ(r.ids[i], static_cast<std::int32_t>(i % 11));
    }
  }
}

TEST_P(SecretMoe, NanInputSelectsValidIds) {
  const MoeLayer layer({});
  std::vector<float> x = normal_values(5 * 96, 10);
  x[2 * 96 + 7] = kNan;
  x[3 * 96 + 1] = kInf;
  const std::vector<float> clean(x.begin(), x.begin() + 2 * 96);
  Lender lender(2);
  for (const MoePath path : kPaths) {
    const MoeResult r = run(lender, layer.view, x, path);
    for (std::size_t t = 0; t < 5; ++t) {
      for (std::size_t j = 0; j < 11; ++j) {
        const std::int32_t id = r.ids[t * 11 + j];
        EXPECT_GE(id, j == 0 ? 0 : r.ids[t * 11 + j - 1] + 1);
        EXPECT_LT(id, 40);
      }
    }
    const MoeResult sound = {{r.y.begin(), r.y.begin() + 2 * 96},
                             {r.ids.begin(), r.ids.begin() + 22}};
    expect_layer(layer.view, clean, sound);
  }
}

TEST_P(SecretMoe, Bf16Activations) {
  const MoeLayer layer({});
  std::vector<float> x = normal_values(20 * 96, 10);
  for (float& v : x) v = bf16_to_f32(f32_to_bf16(v));
  Lender lender(2);
  lender.ctx.activations = Activations::BF16;
  const MoeResult first = run(lender, layer.view, x, MoePath::Gather);
  for (const MoePath path : kPaths) {
    const MoeResult r = run(lender, layer.view, x, path);
    EXPECT_EQ(r.ids, first.ids);
    // Operands of two products in a row are rounded to eight bits, an error of 2⁻⁹ each.
    expect_layer(layer.view, x, r, 4 * 0x1p-9);
  }
}

TEST_P(SecretMoe, TallyIsExactlyTheBytesRead) {
  const MoeLayer layer({});
  const std::vector<float> x = normal_values(6 * 96, 10);
  for (const int n_threads : {1, 2, 4}) {
    Lender lender(n_threads);
    const MoeResult r = run(lender, layer.view, x, MoePath::Gather);
    const reference::MoeBytes gather = reference::gather_bytes(layer.view, 6);
    EXPECT_EQ(lender.tally.bytes(Traffic::Router), gather.router);
    EXPECT_EQ(lender.tally.bytes(Traffic::Experts), gather.experts);
    EXPECT_EQ(lender.tally.total(), gather.router + gather.experts);

    lender.tally.reset();
    run(lender, layer.view, x, MoePath::Grouped);
    const reference::MoeBytes grouped = reference::grouped_bytes(layer.view, r.ids);
    EXPECT_EQ(lender.tally.bytes(Traffic::Router), grouped.router);
    EXPECT_EQ(lender.tally.bytes(Traffic::Experts), grouped.experts);
    EXPECT_EQ(lender.tally.total(), grouped.router + grouped.experts);

    lender.tally.reset();
    run(lender, layer.view, x, MoePath::Masked);
    EXPECT_EQ(lender.tally.bytes(Traffic::Experts),
              layer.view.shared.bytes() + layer.view.experts.bytes());
  }
}

/// The experts in pages of their own, those of unselected experts made unreadable.
class GuardedExperts {
 public:
  GuardedExperts(const WeightView& experts, const std::set<std::int32_t>& readable)
      : page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))),
        bytes_((static_cast<std::size_t>(experts.bytes()) + page_ - 1) / page_ * page_),
        data_(static_cast<std::byte*>(
            mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
    std::memcpy(data_, experts.data, static_cast<std::size_t>(experts.bytes()));
    const auto expert_bytes = static_cast<std::size_t>(3 * experts.row_bytes());
    std::vector<bool> needed(bytes_ / page_, false);
    for (const std::int32_t id : readable) {
      const std::size_t first = static_cast<std::size_t>(id) * expert_bytes;
      for (std::size_t p = first / page_; p <= (first + expert_bytes - 1) / page_; ++p) {
        needed[p] = true;
      }
    }
    for (std::size_t p = 0; p < needed.size(); ++p) {
      if (needed[p]) continue;
      mprotect(data_ + p * page_, page_, PROT_NONE);
      ++n_guarded_;
    }
  }
  ~GuardedExperts() { munmap(data_, bytes_); }
  GuardedExperts(const GuardedExperts&) = delete;
  GuardedExperts& operator=(const GuardedExperts&) = delete;

  const std::byte* data() const { return data_; }
  std::size_t n_guarded() const { return n_guarded_; }

 private:
  std::size_t page_;
  std::size_t bytes_;
  std::byte* data_;
  std::size_t n_guarded_ = 0;
};

TEST_P(SecretMoe, UnselectedExpertsAreNotTouched) {
  // An expert of 3 · 4096 bytes is three whole pages.
  for (const DType dtype : {DType::F32, DType::BF16}) {
    const std::int64_t d_model = dtype == DType::F32 ? 1024 : 2048;
    MoeLayer layer({.experts = dtype, .d_model = d_model, .n_experts = 30, .n_active = 4});
    const std::vector<float> x = normal_values(size(3 * d_model), 10);
    for (const std::int64_t n_tokens : {1, 3}) {
      const std::vector<float> part(x.begin(), x.begin() + n_tokens * d_model);
      for (const MoePath path : {MoePath::Gather, MoePath::Grouped}) {
        layer.view.experts = layer.experts.view();
        Lender lender(2);
        const MoeResult plain = run(lender, layer.view, part, path);
        const std::set<std::int32_t> chosen(plain.ids.begin(), plain.ids.end());
        const GuardedExperts guarded(layer.experts.view(), chosen);
        EXPECT_EQ(guarded.n_guarded(), 3 * (30 - chosen.size()));
        layer.view.experts.data = guarded.data();
        EXPECT_EQ(run(lender, layer.view, part, path).y, plain.y);
      }
    }
  }
}

TEST(SecretMoeWorkspace, SteadyStateAllocatesNothing) {
  const MoeLayer layer({});
  const std::vector<float> x = normal_values(96, 10);
  Lender lender(2);
  run(lender, layer.view, x, MoePath::Gather);
  const std::size_t capacity = lender.workspace.capacity();
  run(lender, layer.view, x, MoePath::Gather);
  EXPECT_EQ(lender.workspace.capacity(), capacity);
}

template <class Change>
void expect_shape_error(Change&& change, std::string_view part) {
  MoeLayer layer({});
  change(layer.view);
  try {
    check_shapes(layer.view);
    FAIL() << "no error for " << part;
  } catch (const ShapeError& e) {
    EXPECT_NE(std::string_view(e.what()).find(part), std::string_view::npos) << e.what();
  }
}

TEST(SecretMoeShape, ErrorsNameThePart) {
  EXPECT_NO_THROW(check_shapes(MoeLayer({}).view));
  expect_shape_error([](SecretMoeView& v) { v.n_active = 41; }, "n_active is 41, expected 0 to 40");
  expect_shape_error([](SecretMoeView& v) { v.n_active = -1; }, "n_active");
  expect_shape_error([](SecretMoeView& v) { v.bias = {}; }, "bias");
  expect_shape_error([](SecretMoeView& v) { v.experts.rows -= 1; }, "three per neuron");
  expect_shape_error([](SecretMoeView& v) { v.shared.cols = 64; }, "shared is [15, 64]");
  expect_shape_error([](SecretMoeView& v) { v.experts.cols = 64; }, "experts is [120, 64]");
  expect_shape_error([](SecretMoeView& v) { v.experts.dtype = DType::Q4_K; }, "Q4_K");
  expect_shape_error([](SecretMoeView& v) { v.expert_mean = v.expert_mean.first(3); },
                     "mean has 3 elements, expected 40");
  expect_shape_error([](SecretMoeView& v) { v.router_bias = {}; }, "router bias");
  expect_shape_error([](SecretMoeView& v) { v.router_v.cols = 32; }, "router V");
  expect_shape_error([](SecretMoeView& v) { v.router_u.rows = 39; }, "router U is [39, 32]");
  expect_shape_error([](SecretMoeView& v) { v.bypass_q = {}; }, "bypass");
  expect_shape_error([](SecretMoeView& v) { v.bypass_p.cols = 64; }, "bypass P");
}

TEST(SecretMoeShape, BatchMustFit) {
  const MoeLayer layer({});
  std::vector<float> x(96 * 2);
  std::vector<float> y(96 * 2);
  std::vector<std::int32_t> ids(11);
  Lender lender;
  EXPECT_THROW(
      secret_moe(lender.ctx, layer.view, ConstMatrix(x.data(), 2, 95), Matrix(y.data(), 2, 96)),
      ShapeError);
  EXPECT_THROW(secret_moe(lender.ctx, layer.view, ConstMatrix(x.data(), 2, 96),
                          Matrix(y.data(), 2, 96), MoePath::Auto, ids),
               ShapeError);
}

}  // namespace
}  // namespace moesaic::kernels
