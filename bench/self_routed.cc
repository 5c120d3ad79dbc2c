#include "kernels/self_routed.h"

#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <random>
#include <thread>

#include "kernels/base/huge_buffer.h"
#include "kernels/packing.h"
#include "tests/kernels/packed.h"
#include "tests/reference/self_routed.h"
#include "tools/machine_limits.h"

// SmolLM2-135M's MLP with Q16 activations, dense and self-routed by both paths. A model's worth of
// layers is run in turn, so that weights come from memory as in decoding. Times are per layer;
// bytes per second are the weight bytes that the kernels tally, and of_limit their share of the
// read bandwidth that as many threads measured just before and after. `active` is the share of the
// dense multiply-adds that the thresholds leave.

namespace moesaic {
namespace {

constexpr std::int64_t kDModel = 576;
constexpr std::int64_t kDFf = 1536;
constexpr std::size_t kLayers = 30;
constexpr std::int64_t kTokens = 64;  // taken in turn

// Shares of inputs, routed and kept neurons.
struct Shares {
  float input, gate, hidden;
};

std::vector<float> values(std::int64_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> v(static_cast<std::size_t>(n));
  for (float& x : v) x = normal(random);
  return v;
}

// The threshold that this share of the values reaches.
float threshold(std::vector<float> values, float share) {
  for (float& v : values) v = std::fabs(v);
  std::sort(values.begin(), values.end(), std::greater<>());
  const auto at = static_cast<std::size_t>(static_cast<float>(values.size()) * share);
  return at >= values.size() ? 0.0f : values[at];
}

/// One layer's weights, packed again and again into memory of their own.
struct Model {
  Model(DType dtype, bool up_by_input, const Shares& shares)
      : gate(dtype, kDFf, kDModel, 1, 0.05f),
        up(dtype, kDFf, kDModel, 2, 0.05f),
        down(dtype, kDModel, kDFf, 3, 0.05f),
        x(values(kTokens * kDModel, 4)) {
    plain.up_by_input = up_by_input;
    plain.w_gate = gate.view();
    plain.w_up = up.view();
    plain.w_down = down.view();
    plain.input_share = shares.input;
    plain.gate_share = up_by_input ? 1.0f : shares.gate;
    plain.hidden_share = shares.hidden;
    set_thresholds(shares);
    ThreadPool pool(1);
    kernels::Pieces count(nullptr);
    for (std::size_t i = 0; i < kLayers; ++i) {
      layers.push_back(plain);
      kernels::pack_self_routed(layers.back(), pool, count);
    }
    buffer = HugeBuffer(count.used());
    kernels::Pieces pieces(buffer.data());
    for (kernels::SelfRoutedView& layer : layers) kernels::pack_self_routed(layer, pool, pieces);
  }

  void set_thresholds(const Shares& shares) {
    input_threshold.assign(kDModel, threshold(x, shares.input));
    std::vector<float> large = x, g(kTokens * kDFf), u(g.size());
    for (float& v : large) v = std::fabs(v) >= input_threshold[0] ? v : 0.0f;
    ThreadPool pool(1);
    Workspace workspace;
    Tally tally;
    Context ctx{pool, workspace, tally};
    const ConstMatrix all(x.data(), kTokens, kDModel), some(large.data(), kTokens, kDModel);
    const Matrix g_rows(g.data(), kTokens, kDFf), u_rows(u.data(), kTokens, kDFf);
    kernels::linear(ctx, plain.w_gate, some, g_rows, Traffic::Mlp);
    kernels::linear(ctx, plain.w_up, plain.up_by_input ? some : all, u_rows, Traffic::Mlp);
    for (float& v : g) v = kernels::activate(plain.phi, v);
    const float at_gate = plain.up_by_input ? 0.0f : threshold(g, shares.gate);
    for (std::size_t i = 0; i < g.size(); ++i) {
      g[i] = std::fabs(g[i]) >= at_gate ? g[i] * u[i] : 0.0f;
    }
    gate_threshold.assign(plain.up_by_input ? 0 : kDFf, at_gate);
    hidden_threshold.assign(kDFf, threshold(g, shares.hidden));
    plain.input_threshold = input_threshold;
    plain.gate_threshold = gate_threshold;
    plain.hidden_threshold = hidden_threshold;
  }

  Packed gate, up, down;
  std::vector<float> x;
  std::vector<float> input_threshold, gate_threshold, hidden_threshold;
  kernels::SelfRoutedView plain;
  std::vector<kernels::SelfRoutedView> layers;
  HugeBuffer buffer;
};

struct Setting {
  DType dtype;
  bool up_by_input;
  Shares shares;
  std::int64_t n_tokens;
  int n_threads;
};

const Model& model(const Setting& s) {
  struct Made {
    DType dtype;
    bool up_by_input;
    float input;
    Model model;
  };
  static std::deque<Made> all;
  for (const Made& m : all) {
    if (m.dtype == s.dtype && m.up_by_input == s.up_by_input && m.input == s.shares.input) {
      return m.model;
    }
  }
  while (all.size() > 1) all.pop_front();
  all.push_back({s.dtype, s.up_by_input, s.shares.input, Model(s.dtype, s.up_by_input, s.shares)});
  return all.back().model;
}

// What differs between the ways: fn(ctx, layer, x, y) returns the multiply-adds.
template <class Fn>
void time(benchmark::State& state, const Setting& s, Fn&& fn) {
  const Model& m = model(s);
  ThreadPool pool(s.n_threads);
  Workspace workspace;
  Tally tally;
  Context ctx{pool, workspace, tally, Activations::Q16};
  std::vector<float> y(static_cast<std::size_t>(s.n_tokens * kDModel));
  const Matrix y_rows(y.data(), s.n_tokens, kDModel);
  const auto x_rows = [&](std::int64_t i) {
    return ConstMatrix(m.x.data() + i * s.n_tokens % kTokens * kDModel, s.n_tokens, kDModel);
  };
  tools::MachineLimits limits(pool);
  limits.sample();
  std::int64_t work = 0, calls = 0;
  fn(ctx, m.layers[0], x_rows(0), y_rows);
  tally.reset();
  for (auto _ : state) {
    work += fn(ctx, m.layers[static_cast<std::size_t>(calls) % kLayers], x_rows(calls), y_rows);
    ++calls;
  }
  limits.sample();
  state.SetBytesProcessed(tally.total());
  state.counters["KB"] = static_cast<double>(tally.total()) / static_cast<double>(calls) / 1e3;
  state.counters["of_limit"] = benchmark::Counter(
      static_cast<double>(tally.total()) / limits.read_bandwidth(), benchmark::Counter::kIsRate);
  state.counters["active"] =
      static_cast<double>(work) / static_cast<double>(calls * s.n_tokens * 3 * kDModel * kDFf);
}

void dense(benchmark::State& state, const Setting& s) {
  std::vector<float> h(static_cast<std::size_t>(s.n_tokens * kDFf));
  const Matrix h_rows(h.data(), s.n_tokens, kDFf);
  time(state, s, [&](Context& ctx, const kernels::SelfRoutedView& l, ConstMatrix x, Matrix y) {
    kernels::gated_linear(ctx, {.x = x}, l.phi, l.w_gate, l.w_up, h_rows, Traffic::Mlp);
    kernels::linear(ctx, l.w_down, h_rows, y, Traffic::Mlp);
    return x.rows * 3 * kDModel * kDFf;
  });
}

void self_routed(benchmark::State& state, const Setting& s, kernels::SelfRoutedPath path) {
  const Model& m = model(s);
  std::vector<float> y(kDModel);
  const ConstMatrix first(m.x.data(), 1, kDModel);
  {
    ThreadPool pool(s.n_threads);
    Workspace workspace;
    Tally tally;
    Context ctx{pool, workspace, tally, Activations::Q16};
    kernels::self_routed(ctx, m.layers[0], {.x = first}, Matrix(y.data(), 1, kDModel), {}, path);
  }
  reference::Precision p{.unit = 0.5001 / (127 * 128), .sum = 0x1p-18};
  if (s.dtype == DType::BF16) p = {.element = 0x1.01p-9, .sum = 0x1p-18};
  const reference::SelfRouted expected = reference::self_routed(m.plain, first, p, p, p);
  for (std::size_t i = 0; i < y.size(); ++i) {
    if (!(std::fabs(y[i] - expected.y[i]) <= expected.error[i])) {
      return state.SkipWithError("differs from the reference");
    }
  }
  time(state, s, [&](Context& ctx, const kernels::SelfRoutedView& l, ConstMatrix x, Matrix to) {
    return kernels::self_routed(ctx, l, {.x = x}, to, {}, path);
  });
}

template <class Fn>
void add(const std::string& name, Fn&& fn) {
  benchmark::RegisterBenchmark(name.c_str(), fn)->UseRealTime()->Unit(benchmark::kMicrosecond);
}

}  // namespace
}  // namespace moesaic

int main(int argc, char** argv) {
  using moesaic::DType;
  using moesaic::kernels::SelfRoutedPath;
  benchmark::Initialize(&argc, argv);
  const int all = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  constexpr moesaic::Shares kShares[] = {
      {0.4f, 0.35f, 0.3f}, {0.6f, 0.5f, 0.4f}, {0.8f, 0.7f, 0.6f}};
  for (const DType dtype : {DType::Q4_1, DType::Q8_0, DType::BF16, DType::Q4_0}) {
    for (const bool up_by_input : {false, true}) {
      for (const moesaic::Shares& shares : kShares) {
        for (const std::int64_t n_tokens : {1, 2, 4, 64}) {
          for (const int n_threads : {1, all}) {
            const moesaic::Setting s{dtype, up_by_input, shares, n_tokens, n_threads};
            const std::string at = fmt::format(
                "{}/{}/inputs:{}/routed:{}/kept:{}/x:[{},{}]/threads:{}",
                moesaic::traits(dtype).name, up_by_input ? "glu+input" : "glu+gate", shares.input,
                shares.gate, shares.hidden, n_tokens, moesaic::kDModel, n_threads);
            moesaic::add("dense/" + at, [=](benchmark::State& state) { moesaic::dense(state, s); });
            for (const auto& [path, name] : {std::pair{SelfRoutedPath::Sparse, "sparse/"},
                                             std::pair{SelfRoutedPath::Dense, "masked/"}}) {
              if (n_tokens == 64 && path == SelfRoutedPath::Sparse) continue;
              moesaic::add(name + at, [=, path = path](benchmark::State& state) {
                moesaic::self_routed(state, s, path);
              });
            }
          }
        }
      }
    }
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
