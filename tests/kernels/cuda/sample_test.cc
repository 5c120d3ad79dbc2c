#include "kernels/cuda/sample.h"

#include "engine/sampler.h"
#include "kernels/base/error.h"
#include "tests/kernels/cuda/device.h"
#include "tests/kernels/support.h"

namespace moesaic::cuda {
namespace {

class Sample : public OnDevice {
 protected:
  static constexpr std::int64_t kMaxRows = 40;
  Sample() : workspace(sample_workspace(kMaxRows)) {
    zero_bytes(workspace.data(), workspace.size(), stream);
  }
  // n tokens from the same logits, with random numbers one after the other.
  void expect_the_samplers(const std::vector<float>& logits, const engine::SamplingOptions& options,
                           int n = 12) {
    engine::Sampler drawing(options), on_host_sampler(options);
    std::vector<kernels::Draw> draws;
    std::vector<std::int32_t> expected;
    for (int i = 0; i < n; ++i) {
      draws.push_back(drawing.draw());
      expected.push_back(on_host_sampler.sample(logits, {}));
    }
    const auto cols = static_cast<std::int64_t>(logits.size());
    const auto device_logits = on_device(logits, stream);
    const auto device_draws = on_device(draws, stream);
    const DeviceBuffer<std::int32_t> ids(draws.size());
    sample({device_logits.data(), n, cols, 0}, device_draws.data(), ids.data(), workspace.data(),
           stream);
    EXPECT_EQ(on_host(ids, stream), expected)
        << cols << " logits, temperature " << options.temperature << ", top_k " << options.top_k
        << ", top_p " << options.top_p << ", min_p " << options.min_p;
  }

  DeviceBuffer<std::byte> workspace;  // one for all calls of a test
};

engine::SamplingOptions options(float temperature, int top_k, float top_p, float min_p) {
  engine::SamplingOptions o;
  o.temperature = temperature;
  o.top_k = top_k;
  o.top_p = top_p;
  o.min_p = min_p;
  o.seed = 7;
  return o;
}

TEST_F(Sample, GreedyPicksTheLargestLowestId) {
  for (const std::size_t n : {1, 2, 31, 1023, 1024, 1025, 5000}) {
    expect_the_samplers(normal_values(n, static_cast<unsigned>(n)), options(0, 40, 0.9F, 0), 1);
  }
  expect_the_samplers({1, 3, 3, 2}, options(0, 0, 1, 0), 1);
  expect_the_samplers({-0.0F, 0.0F, -1}, options(0, 0, 1, 0), 1);
  expect_the_samplers({-1, 0.0F, -0.0F}, options(0, 0, 1, 0), 1);
  expect_the_samplers({kNan, -kInf, kNan, -kInf}, options(0, 0, 1, 0), 1);
  expect_the_samplers({kNan, 2, kInf, kInf}, options(0, 0, 1, 0), 1);
}

TEST_F(Sample, WholeVocabulary) {
  for (const std::size_t n : {1, 2, 33, 700, 3000}) {
    expect_the_samplers(normal_values(n, 1, 2), options(1, 0, 1, 0));
    expect_the_samplers(normal_values(n, 2, 2), options(0.3F, 0, 1, 0));
  }
  expect_the_samplers(std::vector<float>(300, 1.5F), options(1, 0, 1, 0));
}

TEST_F(Sample, TopK) {
  // 1500: more than are kept in shared memory; 2000 and 2001: all.
  for (const int k : {1, 2, 40, 1024, 1025, 1500, 1999, 2000, 2001}) {
    expect_the_samplers(normal_values(2000, 3, 2), options(1, k, 1, 0));
  }
}

TEST_F(Sample, TopP) {
  for (const float p : {0.0F, 0.1F, 0.5F, 0.95F, 0.9999F}) {
    expect_the_samplers(normal_values(1500, 4, 3), options(0.8F, 0, p, 0));
    expect_the_samplers(normal_values(1500, 5, 3), options(0.8F, 40, p, 0));
    expect_the_samplers(normal_values(2600, 6, 0.1F), options(1, 0, p, 0));  // nearly flat
    expect_the_samplers(normal_values(2600, 7, 0.1F), options(1, 2000, p, 0));
  }
}

TEST_F(Sample, MinP) {
  for (const float p : {0.01F, 0.2F, 1.0F}) {
    expect_the_samplers(normal_values(1500, 8, 2), options(1.5F, 0, 1, p));
    expect_the_samplers(normal_values(1500, 9, 2), options(1.5F, 40, 0.95F, p));
  }
}

TEST_F(Sample, TiesGoByTheLowestId) {
  std::vector<float> logits = normal_values(1200, 10, 2);
  for (float& x : logits) x = std::round(x);
  expect_the_samplers(logits, options(1, 0, 1, 0));
  for (const int k : {3, 50, 1100}) {
    expect_the_samplers(logits, options(1, k, 1, 0));
    expect_the_samplers(logits, options(1, k, 0.7F, 0));
  }
  expect_the_samplers(logits, options(2, 0, 0.5F, 0));
  expect_the_samplers({-0.0F, 0.0F, -0.0F, 0.0F, -1}, options(1, 3, 1, 0));
}

TEST_F(Sample, NanAndInfinities) {
  expect_the_samplers({kNan, 1, 2, kNan, 0}, options(1, 0, 1, 0));
  expect_the_samplers({kNan, 1, 2, kNan, 0}, options(1, 4, 0.9F, 0));
  expect_the_samplers({kInf, 1, 2, kInf, 0}, options(1, 0, 1, 0));
  expect_the_samplers({kInf, 1, 2, kInf, 0}, options(1, 3, 0.9F, 0.1F));
  expect_the_samplers({-kInf, 1, 2, -kInf, 0}, options(1, 4, 0.99F, 0));
  expect_the_samplers({-kInf, kNan, -kInf}, options(1, 0, 1, 0));
  expect_the_samplers({-1000, 0, -2000, 1000}, options(1, 3, 1, 0));
}

TEST_F(Sample, NanBetweenManyNumbers) {
  std::vector<float> logits = normal_values(3000, 15, 2);
  for (std::size_t i = 0; i < logits.size(); i += 3) logits[i] = kNan;
  logits[256] = 9;  // of a thread that begins with NaN
  expect_the_samplers(logits, options(0, 0, 1, 0), 1);
  for (const int k : {0, 40, 1999, 2000, 2001, 2999}) {  // 2000 numbers
    expect_the_samplers(logits, options(2, k, 1, 0), 3);
    expect_the_samplers(logits, options(2, k, 0.9F, 0), 3);
  }
}

TEST_F(Sample, RowsOfTheirOwn) {
  const std::vector<engine::SamplingOptions> each = {
      options(0, 0, 1, 0), options(1, 40, 0.95F, 0.05F), options(0.7F, 0, 0.9F, 0),
      options(1, 0, 1, 0)};
  const std::int64_t n = std::ssize(each), cols = 600;
  const auto logits = normal_values(size(n * cols), 11, 2);
  std::vector<kernels::Draw> draws;
  std::vector<std::int32_t> expected;
  for (std::size_t i = 0; i < each.size(); ++i) {
    draws.push_back(engine::Sampler(each[i]).draw());
    expected.push_back(
        engine::Sampler(each[i]).sample(std::span(logits).subspan(i * size(cols), size(cols)), {}));
  }
  // A row without a number last.
  std::vector<float> with_nan = logits;
  with_nan.resize(size((n + 1) * cols), kNan);
  draws.push_back(draws[1]);
  expected.push_back(-1);
  const DeviceMatrix in(with_nan, n + 1, cols, stream);
  const auto device_draws = on_device(draws, stream);
  const DeviceBuffer<std::int32_t> ids(draws.size());
  sample(in.view(), device_draws.data(), ids.data(), workspace.data(), stream);
  EXPECT_EQ(on_host(ids, stream), expected);
}

// Blocks of a row take 2048 logits each, where the device holds so many: few rows at once here.
TEST_F(Sample, RowsOfSeveralParts) {
  for (const std::size_t n : {2047, 2048, 2049, 4097, 12001}) {
    const auto logits = normal_values(n, static_cast<unsigned>(n), 3);
    expect_the_samplers(logits, options(0, 0, 1, 0), 1);
    for (const int rows : {1, 3}) {
      expect_the_samplers(logits, options(0.8F, 40, 0.95F, 0.05F), rows);
      expect_the_samplers(logits, options(1.5F, 0, 0.9F, 0), rows);
      expect_the_samplers(logits, options(1, 0, 1, 0), rows);
    }
  }
}

// More rows than blocks at once, and every way of drawing beside every other.
TEST_F(Sample, MoreRowsThanBlocks) {
  const std::vector<engine::SamplingOptions> each = {
      options(0, 0, 1, 0), options(1, 40, 0.95F, 0.05F), options(0.7F, 0, 0.9F, 0),
      options(1, 0, 1, 0), options(1, 300, 1, 0)};
  const std::int64_t cols = 4500;
  const auto logits = normal_values(size(kMaxRows * cols), 12, 2);
  std::vector<kernels::Draw> draws;
  std::vector<std::int32_t> expected;
  for (std::size_t i = 0; i < size(kMaxRows); ++i) {
    auto own = each[i % each.size()];
    own.seed = i;
    draws.push_back(engine::Sampler(own).draw());
    expected.push_back(
        engine::Sampler(own).sample(std::span(logits).subspan(i * size(cols), size(cols)), {}));
  }
  const DeviceMatrix in(logits, kMaxRows, cols, stream);
  const auto device_draws = on_device(draws, stream);
  const DeviceBuffer<std::int32_t> ids(draws.size());
  for (int times = 0; times < 2; ++times) {
    sample(in.view(), device_draws.data(), ids.data(), workspace.data(), stream);
    EXPECT_EQ(on_host(ids, stream), expected);
  }
}

// Candidates beyond the 4096 that are listed: one block goes over the row.
TEST_F(Sample, ListsThatAreTooShort) {
  for (const std::size_t n : {4096, 4097, 6000}) {
    expect_the_samplers(std::vector<float>(n, 1.5F), options(1, 40, 1, 0), 3);
    expect_the_samplers(std::vector<float>(n, 1.5F), options(1, 0, 0.5F, 0), 3);
  }
  const auto flat = normal_values(6000, 13, 0.01F);
  expect_the_samplers(flat, options(1, 5000, 1, 0), 3);
  expect_the_samplers(flat, options(1, 0, 0.9F, 0), 3);
  expect_the_samplers(flat, options(1, 4500, 0.9F, 0.5F), 3);
}

// Logits so far apart that cuts fall in the last step.
TEST_F(Sample, CutsFarBelowTheLargest) {
  std::vector<float> logits = normal_values(3000, 14, 5);
  logits[1234] = 100;
  for (const int k : {1, 2, 40, 2999}) expect_the_samplers(logits, options(30, k, 1, 0), 6);
  expect_the_samplers(logits, options(30, 0, 0.9999F, 0), 6);
  logits[7] = kInf;
  expect_the_samplers(logits, options(30, 40, 1, 0), 3);
}

TEST_F(Sample, EmptyBatchesAndSizes) {
  sample({nullptr, 0, 10, 10}, nullptr, nullptr, nullptr, stream);
  EXPECT_THROW(sample({nullptr, 1, 0, 0}, nullptr, nullptr, nullptr, stream), ShapeError);
  EXPECT_THROW(sample({nullptr, 1, (1 << 18) + 1, 0}, nullptr, nullptr, nullptr, stream),
               ShapeError);
}

}  // namespace
}  // namespace moesaic::cuda
