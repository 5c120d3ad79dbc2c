#include "kernels/secret_moe.h"

#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <array>
#include <cmath>
#include <random>
#include <thread>

#include "kernels/activation.h"
#include "kernels/base/huge_buffer.h"
#include "kernels/linear.h"
#include "kernels/packing.h"
#include "tests/kernels/packed.h"
#include "tests/reference/secret_moe.h"

// SmolLM2-135M's MLP, dense and as secret MoE, in the formats of its checkpoint and of the
// converter. A model's worth of layers is run in turn, so that weights come from memory as in
// decoding. Times are per layer; bytes per second are the weight bytes that the kernels tally.

namespace moesaic {
namespace {

constexpr std::int64_t kDModel = 576;
constexpr std::int64_t kDFf = 1536;
constexpr std::int64_t kShared = 128;
constexpr std::int64_t kExperts = kDFf - kShared;
constexpr std::int64_t kRank = 64;
constexpr std::size_t kLayers = 30;

std::vector<float> values(std::int64_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> v(static_cast<std::size_t>(n));
  for (float& x : v) x = normal(random);
  return v;
}

/// Memory filled by pack(pool, pieces), which is called twice.
template <class Pack>
HugeBuffer filled(Pack&& pack) {
  ThreadPool pool(1);
  kernels::Pieces count(nullptr);
  pack(pool, count);
  HugeBuffer buffer(count.used());
  kernels::Pieces pieces(buffer.data());
  pack(pool, pieces);
  return buffer;
}

struct MoeLayer {
  explicit MoeLayer(unsigned seed)
      : shared(DType::Q4_1, 3 * kShared, kDModel, seed, 0.05f),
        experts(DType::Q4_1, 3 * kExperts, kDModel, seed + 1, 0.05f),
        v(DType::Q8_0, kRank, kDModel, seed + 2, 0.05f),
        u(DType::Q8_0, kExperts, kRank, seed + 3),
        q(DType::Q8_0, kRank, kDModel, seed + 4, 0.05f),
        p(DType::Q8_0, kDModel, kRank, seed + 5, 0.05f),
        mean(values(kExperts, seed + 6)),
        c(values(kExperts, seed + 7)),
        bias(values(kDModel, seed + 8)) {
    const auto pack_all = [&](ThreadPool& pool, kernels::Pieces& pieces) {
      packed = plain();
      kernels::pack_secret_moe(packed, pool, pieces);
    };
    buffer = filled(pack_all);
  }

  kernels::SecretMoeView view(std::int64_t n_active) const {
    kernels::SecretMoeView v = packed;
    v.n_active = n_active;
    return v;
  }
  kernels::SecretMoeView plain() const {
    return {.shared = shared.view(),
            .experts = experts.view(),
            .expert_mean = mean,
            .router_v = v.view(),
            .router_u = u.view(),
            .router_bias = c,
            .bypass_q = q.view(),
            .bypass_p = p.view(),
            .bias = bias};
  }

  Packed shared, experts, v, u, q, p;
  std::vector<float> mean, c, bias;
  kernels::SecretMoeView packed;  // with the orders that Q16 reads
  HugeBuffer buffer;
};

struct DenseLayer {
  explicit DenseLayer(unsigned seed)
      : gate(DType::Q4_1, kDFf, kDModel, seed, 0.05f),
        up(DType::Q4_1, kDFf, kDModel, seed + 1, 0.05f),
        down(DType::Q4_1, kDModel, kDFf, seed + 2, 0.05f),
        views{gate.view(), up.view(), down.view()} {
    buffer = filled([&](ThreadPool& pool, kernels::Pieces& pieces) {
      for (WeightView& w : views) kernels::pack_matrix(w, pool, pieces);
    });
  }
  Packed gate, up, down;
  std::array<WeightView, 3> views;
  HugeBuffer buffer;
};

template <class Layer>
const std::vector<Layer>& layers() {
  static const std::vector<Layer> all = [] {
    std::vector<Layer> made;
    made.reserve(kLayers);
    for (std::size_t i = 0; i < kLayers; ++i) made.emplace_back(static_cast<unsigned>(10 * i));
    return made;
  }();
  return all;
}

struct Setting {
  std::int64_t n_tokens;
  Activations activations;
  int n_threads;
};

std::string text(const Setting& s) {
  const char* name = s.activations == Activations::F32    ? "F32"
                     : s.activations == Activations::BF16 ? "BF16"
                                                          : "Q16";
  return fmt::format("x:{}[{},{}]/threads:{}", name, s.n_tokens, kDModel, s.n_threads);
}

// What a benchmark's calls borrow.
struct Lent {
  explicit Lent(const Setting& s)
      : pool(s.n_threads),
        ctx{pool, workspace, tally, s.activations},
        x(values(s.n_tokens * kDModel, 1)),
        y(x.size()),
        x_rows(x.data(), s.n_tokens, kDModel),
        y_rows(y.data(), s.n_tokens, kDModel) {}
  ThreadPool pool;
  Workspace workspace;
  Tally tally;
  Context ctx;
  std::vector<float> x, y;
  ConstMatrix x_rows;
  Matrix y_rows;
};

void dense(benchmark::State& state, const Setting& setting) {
  Lent lent(setting);
  std::vector<float> h(static_cast<std::size_t>(setting.n_tokens * kDFf));
  const Matrix h_rows(h.data(), setting.n_tokens, kDFf);
  const std::vector<DenseLayer>& all = layers<DenseLayer>();
  std::size_t next = 0;
  for (auto _ : state) {
    const DenseLayer& l = all[next++ % kLayers];
    kernels::gated_linear(lent.ctx, {.x = lent.x_rows}, kernels::Activation::Silu, l.views[0],
                          l.views[1], h_rows, Traffic::Mlp);
    kernels::linear(lent.ctx, l.views[2], h_rows, lent.y_rows, Traffic::Mlp);
  }
  state.SetBytesProcessed(lent.tally.total());
}

void moe(benchmark::State& state, std::int64_t n_active, kernels::MoePath path,
         const Setting& setting) {
  Lent lent(setting);
  const std::vector<MoeLayer>& all = layers<MoeLayer>();
  const kernels::SecretMoeView first = all[0].view(n_active);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(setting.n_tokens * n_active));
  kernels::secret_moe(lent.ctx, first, lent.x_rows, lent.y_rows, path, ids);
  ids.resize(static_cast<std::size_t>(n_active));
  const reference::SecretMoe expected = reference::secret_moe(first, lent.x_rows.slice(0, 1), ids);
  // Q16's masked path rounds the down rows to bfloat16.
  const double error = setting.activations == Activations::F32 ? 0x1p-18 : 0x1p-7;
  for (std::size_t i = 0; i < expected.y.size(); ++i) {
    if (std::fabs(lent.y[i] - expected.y[i]) > error * expected.magnitude[i]) {
      return state.SkipWithError("differs from the reference");
    }
  }
  lent.tally.reset();
  std::size_t next = 0;
  for (auto _ : state) {
    kernels::secret_moe(lent.ctx, all[next++ % kLayers].view(n_active), lent.x_rows, lent.y_rows,
                        path);
  }
  state.SetBytesProcessed(lent.tally.total());
}

template <class Fn>
void add(const std::string& name, Fn&& fn) {
  benchmark::RegisterBenchmark(name.c_str(), fn)->UseRealTime()->Unit(benchmark::kMicrosecond);
}

}  // namespace
}  // namespace moesaic

int main(int argc, char** argv) {
  using moesaic::Activations;
  using moesaic::kernels::MoePath;
  benchmark::Initialize(&argc, argv);
  const int all = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  constexpr std::pair<MoePath, const char*> kPaths[] = {{MoePath::Gather, "gather"},
                                                        {MoePath::Grouped, "grouped"},
                                                        {MoePath::Masked, "masked"},
                                                        {MoePath::Auto, "auto"}};
  for (const Activations activations : {Activations::F32, Activations::BF16, Activations::Q16}) {
    for (const std::int64_t n_tokens : {1, 2, 4, 8, 16, 32, 64, 512}) {
      for (const int n_threads : {1, all}) {
        const moesaic::Setting setting{n_tokens, activations, n_threads};
        const std::string at = moesaic::text(setting);
        moesaic::add(fmt::format("dense/Q4_1/d_ff:{}/{}", moesaic::kDFf, at),
                     [=](benchmark::State& state) { moesaic::dense(state, setting); });
        for (const std::int64_t k : {256, 384, 512}) {
          if (n_tokens > 1 && k != 384) continue;
          for (const auto& [path, name] : kPaths) {
            moesaic::add(fmt::format("{}/Q4_1/shared:{}/experts:{}/k:{}/r:{}/q:{}/{}", name,
                                     moesaic::kShared, moesaic::kExperts, k, moesaic::kRank,
                                     moesaic::kRank, at),
                         [=, path = path](benchmark::State& state) {
                           moesaic::moe(state, k, path, setting);
                         });
          }
        }
      }
    }
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
