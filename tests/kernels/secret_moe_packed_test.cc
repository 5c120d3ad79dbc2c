#include "kernels/base/huge_buffer.h"
#include "kernels/neurons.h"
#include "kernels/packing.h"
#include "tests/kernels/moe_layer.h"

namespace moesaic::kernels {
namespace {

constexpr MoePath kPackedPaths[] = {MoePath::Gather, MoePath::Grouped, MoePath::Masked,
                                    MoePath::Auto};
// The masked path rounds the down rows and their activations to bfloat16.
double allowed(MoePath path, DType dtype) {
  const bool bf16 = dtype == DType::BF16 || path == MoePath::Masked || path == MoePath::Auto;
  return bf16 ? 0x1p-7 : 0x1p-11;
}

/// A layer with all its packed parts.
struct PackedLayer : MoeLayer {
  explicit PackedLayer(const MoeOptions& o) : MoeLayer(o) {
    if (o.n_shared == 0) view.shared = {};  // as a file without the tensor is read
    ThreadPool pool(2);
    SecretMoeView counted = view;
    Pieces count(nullptr);
    pack_secret_moe(counted, pool, count);
    buffer = HugeBuffer(count.used());
    Pieces pieces(buffer.data());
    pack_secret_moe(view, pool, pieces);
  }
  HugeBuffer buffer;
};

class SecretMoePacked : public testing::Test {
 protected:
  void SetUp() override {
    if (!has_neurons(DType::Q4_1, 64)) {
      GTEST_SKIP() << "packed neurons need AVX-512 with VNNI and bfloat16";
    }
    lender.ctx.activations = Activations::Q16;
  }
  Lender lender{2};
};

TEST_F(SecretMoePacked, EveryPathAndFormatEqualsReference) {
  for (const DType dtype : {DType::Q4_0, DType::Q4_1, DType::Q8_0, DType::BF16}) {
    // Lengths with and without a block of 16 units, a group of 128 columns, a last one of 64.
    for (const std::int64_t d_model : {64, 128, 192, 512, 576, 1088}) {
      PackedLayer layer({.experts = dtype,
                         .router = dtype == DType::BF16 ? DType::BF16 : DType::Q8_0,
                         .d_model = d_model,
                         .n_shared = 24,
                         .n_experts = 72,
                         .n_active = 37});
      ASSERT_TRUE(uses_packed(lender.ctx, layer.view));
      for (const Activation phi : {Activation::Silu, Activation::GeluTanh}) {
        layer.view.phi = phi;
        for (const std::int64_t n_tokens : {1, 2, 9, 33}) {
          const std::vector<float> x = normal_values(size(n_tokens * d_model), 10);
          const MoeResult first = run(lender, layer.view, x, MoePath::Gather);
          for (const MoePath path : kPackedPaths) {
            SCOPED_TRACE(testing::Message()
                         << traits(dtype).name << " d_model " << d_model << " tokens " << n_tokens
                         << " path " << static_cast<int>(path));
            const MoeResult r = run(lender, layer.view, x, path);
            EXPECT_EQ(r.ids, first.ids);
            expect_layer(layer.view, x, r, allowed(path, dtype));
          }
        }
      }
    }
  }
}

TEST_F(SecretMoePacked, Edges) {
  const MoeOptions base{.d_model = 128, .n_shared = 32, .n_experts = 64, .n_active = 16};
  std::vector<MoeOptions> cases(6, base);
  cases[0].n_active = 0;
  cases[1].n_active = 64;
  cases[2].n_active = 1;
  cases[3].n_shared = 0;
  cases[4].bypass_rank = 0;
  cases[5].n_active = 17;  // one more than a batch of neurons
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const PackedLayer layer(cases[i]);
    ASSERT_TRUE(uses_packed(lender.ctx, layer.view)) << i;
    for (const int n_threads : {1, 2, 5}) {
      Lender own(n_threads);
      own.ctx.activations = Activations::Q16;
      for (const std::int64_t n_tokens : {1, 5}) {
        const std::vector<float> x = normal_values(size(n_tokens * 128), 10);
        for (const MoePath path : kPackedPaths) {
          SCOPED_TRACE(testing::Message() << "case " << i << " threads " << n_threads << " tokens "
                                          << n_tokens << " path " << static_cast<int>(path));
          expect_layer(layer.view, x, run(own, layer.view, x, path),
                       allowed(path, cases[i].experts));
        }
      }
    }
  }
}

TEST_F(SecretMoePacked, RepeatsBitForBit) {
  const PackedLayer layer({.d_model = 576, .n_shared = 32, .n_experts = 96, .n_active = 40});
  for (const std::int64_t n_tokens : {1, 2, 12}) {
    const std::vector<float> x = normal_values(size(n_tokens * 576), 10);
    for (const MoePath path : kPackedPaths) {
      EXPECT_EQ(run(lender, layer.view, x, path).y, run(lender, layer.view, x, path).y);
    }
  }
}

TEST_F(SecretMoePacked, NanStaysInItsToken) {
  const PackedLayer layer({.d_model = 128, .n_shared = 32, .n_experts = 64, .n_active = 16});
  std::vector<float> x = normal_values(3 * 128, 10);
  x[130] = kNan;
  for (const MoePath path : kPackedPaths) {
    const MoeResult r = run(lender, layer.view, x, path);
    for (const std::int32_t id : r.ids) EXPECT_TRUE(id >= 0 && id < 64);
    for (std::size_t i = 0; i < r.y.size(); ++i) EXPECT_EQ(std::isfinite(r.y[i]), i / 128 != 1);
  }
}

TEST_F(SecretMoePacked, TallyIsExactlyTheBytesRead) {
  const PackedLayer layer({.d_model = 128, .n_shared = 32, .n_experts = 64, .n_active = 16});
  const std::vector<float> x = normal_values(2 * 128, 10);
  run(lender, layer.view, x, MoePath::Gather);
  EXPECT_EQ(lender.tally.bytes(Traffic::Experts),
            2 * (32 + 16) * neuron_layout(DType::Q4_1, 128).neuron_bytes());
  lender.tally.reset();
  const MoeResult grouped = run(lender, layer.view, x, MoePath::Grouped);
  const std::set<std::int32_t> chosen(grouped.ids.begin(), grouped.ids.end());
  EXPECT_EQ(lender.tally.bytes(Traffic::Experts),
            static_cast<std::int64_t>(32 + chosen.size()) *
                neuron_layout(DType::Q4_1, 128).neuron_bytes());
}

TEST_F(SecretMoePacked, PartsWithoutFastFormLeaveTheLayerAsItIs) {
  const PackedLayer odd({.d_model = 96});
  EXPECT_FALSE(uses_packed(lender.ctx, odd.view));
  const std::vector<float> x = normal_values(3 * 96, 10);
  for (const MoePath path : kPackedPaths) {
    expect_layer(odd.view, x, run(lender, odd.view, x, path), 0x1p-11);
  }
}

// Many cheap neurons make grouping pay, few tokens too.
TEST_F(SecretMoePacked, PathIsChosenByCost) {
  const PackedLayer sparse({.d_model = 576, .n_shared = 0, .n_experts = 1408, .n_active = 64});
  const PackedLayer full({.d_model = 576, .n_shared = 0, .n_experts = 1408, .n_active = 1400});
  EXPECT_EQ(choose_moe_path(lender.ctx, sparse.view, 1), MoePath::Gather);
  EXPECT_EQ(choose_moe_path(lender.ctx, sparse.view, 64), MoePath::Grouped);
  EXPECT_EQ(choose_moe_path(lender.ctx, full.view, 64), MoePath::Masked);
}

}  // namespace
}  // namespace moesaic::kernels
