#include "kernels/linear.h"

#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <cmath>
#include <random>
#include <thread>

#include "kernels/base/huge_buffer.h"
#include "kernels/packing.h"
#include "kernels/panels.h"
#include "tests/kernels/packed.h"
#include "tests/reference/linear.h"
#include "tools/machine_limits.h"

// Bytes per second are packed bytes of W; 64 MiB of it, more than the caches hold, as in decoding.
// of_limit is their share of the read bandwidth that as many threads measured just before and
// after.

namespace moesaic {
namespace {

constexpr std::int64_t kBytes = std::int64_t{64} << 20;

std::vector<float> values(std::int64_t n) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> v(static_cast<std::size_t>(n));
  for (float& x : v) x = normal(random);
  return v;
}

/// One row of random weights repeated: quantising 64 MiB would take longer than the benchmark.
AlignedBuffer<std::byte> repeated(const WeightView& row, std::int64_t rows) {
  const auto bytes = static_cast<std::size_t>(row.bytes());
  AlignedBuffer<std::byte> all(bytes * static_cast<std::size_t>(rows));
  for (std::size_t at = 0; at < all.size(); at += bytes) std::memcpy(&all[at], row.data, bytes);
  return all;
}

void run(benchmark::State& state, DType dtype, std::int64_t cols, std::int64_t n_tokens,
         Activations activations, int n_threads) {
  const Packed row(dtype, 1, cols, 1);
  const std::int64_t rows = kBytes / row.view().bytes();
  const AlignedBuffer<std::byte> packed = repeated(row.view(), rows);
  WeightView w{packed.data(), dtype, rows, cols};
  const std::vector<float> x = values(n_tokens * cols);
  std::vector<float> y(static_cast<std::size_t>(n_tokens * rows));
  ThreadPool pool(n_threads);
  HugeBuffer panels;
  if (activations == Activations::Q16) {
    kernels::Pieces count(nullptr);
    kernels::pack_matrix(w, pool, count);
    panels = HugeBuffer(count.used());
    kernels::Pieces pieces(panels.data());
    kernels::pack_matrix(w, pool, pieces);
  }
  Workspace workspace;
  Tally tally;
  Context ctx{pool, workspace, tally, activations};
  const ConstMatrix x_rows(x.data(), n_tokens, cols);
  const Matrix y_rows(y.data(), n_tokens, rows);
  kernels::linear(ctx, w, x_rows, y_rows, Traffic::Mlp);
  const reference::Product expected = reference::linear(w.slice(0, 1), x_rows);
  // bfloat16 rounds X and, in tiles, W; 16-bit integers round X to its units' largest element.
  const bool bf16 =
      activations == Activations::BF16 || (activations == Activations::Q16 && dtype == DType::BF16);
  const double error = bf16 ? 0x1p-7 : activations == Activations::Q16 ? 0x1p-11 : 0x1p-18;
  for (std::int64_t t = 0; t < n_tokens; ++t) {
    for (std::int64_t r = 0; r < rows; ++r) {
      const auto i = static_cast<std::size_t>(t);
      if (std::fabs(y_rows.row(t)[r] - expected.value[i]) > error * expected.magnitude[i]) {
        return state.SkipWithError("differs from the reference");
      }
    }
  }
  tools::MachineLimits limits(pool);
  limits.sample();
  tally.reset();
  for (auto _ : state) kernels::linear(ctx, w, x_rows, y_rows, Traffic::Mlp);
  limits.sample();
  const double limit = limits.read_bandwidth();
  state.SetBytesProcessed(tally.total());
  state.counters["of_limit"] =
      benchmark::Counter(static_cast<double>(tally.total()) / limit, benchmark::Counter::kIsRate);
  state.counters["FLOP/s"] = benchmark::Counter(2.0 * static_cast<double>(rows * cols * n_tokens),
                                                benchmark::Counter::kIsIterationInvariantRate,
                                                benchmark::Counter::OneK::kIs1000);
}

void add(DType dtype, std::int64_t cols, std::int64_t n_tokens, Activations activations,
         int n_threads) {
  const std::int64_t rows = kBytes / row_bytes(dtype, cols);
  const std::string name =
      fmt::format("linear/w:{}[{},{}]/x:{}[{},{}]/threads:{}", traits(dtype).name, rows, cols,
                  activations == Activations::F32    ? "F32"
                  : activations == Activations::BF16 ? "BF16"
                                                     : "Q16",
                  n_tokens, cols, n_threads);
  benchmark::RegisterBenchmark(
      name.c_str(),
      [=](benchmark::State& state) { run(state, dtype, cols, n_tokens, activations, n_threads); })
      ->UseRealTime()
      ->Unit(benchmark::kMillisecond);
}

}  // namespace
}  // namespace moesaic

int main(int argc, char** argv) {
  using moesaic::Activations;
  benchmark::Initialize(&argc, argv);
  const int all = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  for (const moesaic::DTypeTraits& t : moesaic::kDTypes) {
    for (const int n_threads : {1, all}) {
      moesaic::add(t.dtype, t.block_elems == 256 ? 2048 : 576, 1, Activations::F32, n_threads);
    }
  }
  for (const moesaic::DTypeTraits& t : moesaic::kDTypes) {
    if (!moesaic::kernels::has_panels(t.dtype, 768)) continue;
    for (const std::int64_t n_tokens : {1, 8, 64}) {
      for (const int n_threads : {1, all}) {
        moesaic::add(t.dtype, 768, n_tokens, Activations::Q16, n_threads);
      }
    }
  }
  for (const Activations activations : {Activations::F32, Activations::BF16, Activations::Q16}) {
    for (const std::int64_t n_tokens : {4, 8, 12, 16, 64, 512}) {
      moesaic::add(moesaic::DType::Q4_1, 1536, n_tokens, activations, all);
    }
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
