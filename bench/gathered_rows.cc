#include "kernels/gathered_rows.h"

#include <benchmark/benchmark.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels/base/error.h"

// Products with, and sums of, `rows` of 1,024 rows of 640 float32, the batch that a study's experts
// pick their tokens from, on one thread. Bytes are those of the rows picked.

namespace moesaic {
namespace {

constexpr std::int64_t kCols = 640;
constexpr std::int64_t kBatch = 1024;

struct Gathered {
  explicit Gathered(std::int64_t n_rows)
      : matrix(kBatch * kCols),
        a(kCols),
        sum(kCols),
        scale(static_cast<std::size_t>(n_rows)),
        dots(scale.size()) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (auto* values : {&matrix, &a, &scale}) {
      for (float& v : *values) v = normal(random);
    }
    // Several lists in turn: an expert's tokens are elsewhere than the one's before it.
    lists.resize(64);
    for (auto& list : lists) {
      for (std::int64_t i = 0; i < n_rows; ++i) {
        list.push_back(static_cast<std::int32_t>(random() % kBatch));
      }
    }
  }

  ConstMatrix view() const { return {matrix.data(), kBatch, kCols}; }

  void verify(const std::vector<std::int32_t>& rows) {
    kernels::gathered_dots(a, view(), rows, dots);
    kernels::gathered_sum(scale, view(), rows, sum, false);
    std::vector<double> expected(kCols);
    for (std::size_t e = 0; e < rows.size(); ++e) {
      double dot = 0;
      for (std::size_t c = 0; c < a.size(); ++c) {
        const double v = view().row(rows[e])[c];
        dot += v * a[c];
        expected[c] += v * scale[e];
      }
      require<Error>(std::abs(dot - dots[e]) < 1e-3, "gathered_dots differs from the loop");
    }
    for (std::size_t c = 0; c < sum.size(); ++c) {
      require<Error>(std::abs(expected[c] - sum[c]) < 1e-3, "gathered_sum differs from the loop");
    }
  }

  std::vector<float> matrix, a, sum, scale, dots;
  std::vector<std::vector<std::int32_t>> lists;
};

template <class Fn>
void run(benchmark::State& state, Fn&& call) {
  Gathered g(state.range(0));
  for (const auto& rows : g.lists) g.verify(rows);
  std::size_t i = 0;
  for (auto _ : state) {
    call(g, g.lists[i]);
    i = (i + 1) % g.lists.size();
  }
  state.SetBytesProcessed(state.iterations() * state.range(0) * kCols *
                          static_cast<std::int64_t>(sizeof(float)));
}

void gathered_dots(benchmark::State& state) {
  run(state, [](Gathered& g, const std::vector<std::int32_t>& rows) {
    kernels::gathered_dots(g.a, g.view(), rows, g.dots);
  });
}

void gathered_sum(benchmark::State& state) {
  run(state, [](Gathered& g, const std::vector<std::int32_t>& rows) {
    kernels::gathered_sum(g.scale, g.view(), rows, g.sum, false);
  });
}

BENCHMARK(gathered_dots)->ArgName("rows")->Arg(1)->Arg(7)->Arg(26)->Arg(256);
BENCHMARK(gathered_sum)->ArgName("rows")->Arg(1)->Arg(7)->Arg(26)->Arg(256);

}  // namespace
}  // namespace moesaic

BENCHMARK_MAIN();
