#include "kernels/top_k.h"

#include <benchmark/benchmark.h>

#include <random>
#include <vector>

#include "kernels/base/error.h"
#include "tests/reference/ops.h"

// The k largest of n float32 scores, normally distributed, on one thread. Time is per call.

namespace moesaic {
namespace {

void top_k(benchmark::State& state) {
  const auto n = static_cast<std::size_t>(state.range(0));
  const auto k = static_cast<std::size_t>(state.range(1));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  // Several sets of scores in turn, so that the branches are not learnt by heart.
  std::vector<std::vector<float>> sets(16, std::vector<float>(n));
  for (auto& set : sets) {
    for (float& x : set) x = normal(random);
  }
  std::vector<std::uint32_t> keys(n);
  std::vector<std::int32_t> ids(k);
  for (const auto& set : sets) {
    kernels::top_k(set, ids, keys);
    require<Error>(ids == reference::top_k(set, k), "top_k differs from the reference");
  }
  std::size_t i = 0;
  for (auto _ : state) {
    kernels::top_k(sets[i], ids, keys);
    i = (i + 1) % sets.size();
  }
  state.counters["scores/s"] =
      benchmark::Counter(static_cast<double>(n), benchmark::Counter::kIsIterationInvariantRate);
}

BENCHMARK(top_k)
    ->Unit(benchmark::kMicrosecond)
    ->ArgNames({"n", "k"})
    ->Args({1408, 256})
    ->Args({1408, 512})
    ->Args({10000, 256})
    ->Args({49152, 40})
    ->Args({262144, 64});

}  // namespace
}  // namespace moesaic

BENCHMARK_MAIN();
