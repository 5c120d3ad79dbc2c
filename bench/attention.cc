#include "kernels/attention.h"

#include <benchmark/benchmark.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels/base/error.h"
#include "tests/reference/ops.h"

// float32 grouped-query attention. Arguments: n_heads, n_kv_heads, head_dim, queries, keys before
// the first query, threads. Time is per call (one layer); FLOP counts 4 · head_dim for each query,
// head and key it sees.

namespace moesaic {
namespace {

void attention(benchmark::State& state) {
  const int n_heads = static_cast<int>(state.range(0));
  const int n_kv_heads = static_cast<int>(state.range(1));
  const int head_dim = static_cast<int>(state.range(2));
  const std::int64_t n_queries = state.range(3);
  const std::int64_t n_before = state.range(4);
  ThreadPool pool(static_cast<int>(state.range(5)));
  Workspace workspace;
  Tally tally;
  Context ctx{pool, workspace, tally};

  const std::int64_t capacity = n_before + n_queries;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto filled = [&](std::int64_t n) {
    std::vector<float> v(static_cast<std::size_t>(n));
    for (float& x : v) x = normal(random);
    return v;
  };
  std::vector<float> keys = filled(capacity * n_kv_heads * head_dim);
  std::vector<float> values = filled(capacity * n_kv_heads * head_dim);
  const std::int64_t width = std::int64_t{n_heads} * head_dim;
  std::vector<float> q = filled(n_queries * width);
  std::vector<float> out(q.size());
  std::vector<std::int32_t> slots(static_cast<std::size_t>(n_queries), 0);
  std::vector<std::int32_t> positions;
  for (std::int64_t t = 0; t < n_queries; ++t) {
    positions.push_back(static_cast<std::int32_t>(n_before + t));
  }
  const kernels::KvLayerView cache{keys.data(), values.data(), 1, capacity, n_kv_heads, head_dim};
  const kernels::TokenPlaces places{slots, positions};
  const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
  const auto call = [&] {
    kernels::attention(ctx, {q.data(), n_queries, width}, places, cache, n_heads, scale, 0,
                       {out.data(), n_queries, width});
  };

  call();
  const std::vector<double> expected =
      reference::attention({q.data(), n_queries, width}, places, cache, n_heads, scale, 0);
  for (std::size_t i = 0; i < out.size(); ++i) {
    require<Error>(std::abs(out[i] - expected[i]) < 1e-5, "element {} is {}, expected {}", i,
                   out[i], expected[i]);
  }
  tally.reset();
  call();
  const auto bytes = static_cast<double>(tally.total());

  for (auto _ : state) call();
  const double n = static_cast<double>(n_queries);
  const double seen = n * static_cast<double>(n_before) + n * (n + 1) / 2;
  state.counters["FLOP/s"] = benchmark::Counter(4.0 * static_cast<double>(width) * seen,
                                                benchmark::Counter::kIsIterationInvariantRate);
  state.counters["B/s"] = benchmark::Counter(bytes, benchmark::Counter::kIsIterationInvariantRate,
                                             benchmark::Counter::kIs1024);
}

BENCHMARK(attention)
    ->Unit(benchmark::kMicrosecond)
    ->UseRealTime()
    ->ArgNames({"heads", "kv", "dim", "queries", "before", "threads"})
    ->ArgsProduct({{9}, {3}, {64}, {512}, {0}, {1, 2}})
    ->ArgsProduct({{4}, {1}, {256}, {512}, {0}, {1, 2}})
    ->ArgsProduct({{9}, {3}, {64}, {1}, {511, 4095}, {1, 2}})
    ->ArgsProduct({{4}, {1}, {256}, {1}, {511, 4095}, {1, 2}});

}  // namespace
}  // namespace moesaic

BENCHMARK_MAIN();
