#include "engine/throughput.h"

#include <gtest/gtest.h>

#include <string>

#include "tests/engine/fake_decoder.h"

namespace moesaic::engine {
namespace {

// Counts bytes as kernels would.
class CountingDecoder : public FakeDecoder {
 public:
  explicit CountingDecoder(Tally& tally) : tally_(tally) {}
  void forward(const Batch& batch, KvCache& cache, Matrix logits) override {
    FakeDecoder::forward(batch, cache, logits);
    tally_.add(Traffic::Mlp, 100);
  }

 private:
  Tally& tally_;
};

TEST(Throughput, PrefillRunsPassesOfABatchAndOneWarmUp) {
  Tally tally;
  tally.add(Traffic::Head, 12345);  // what stood there before does not count
  CountingDecoder decoder(tally);
  Monitor monitor;
  const Throughput result = measure_prefill(decoder, tally, 20, 8, 3, monitor);
  EXPECT_EQ(decoder.passes, 4 * 3);  // warm-up and three repetitions of 8 + 8 + 4
  EXPECT_EQ(decoder.rows, 4 * 20);
  EXPECT_EQ(decoder.outputs, 4);  // the last token's logits alone
  EXPECT_EQ(decoder.largest, 8);
  EXPECT_EQ(result.tokens_per_second.size(), 3U);
  EXPECT_DOUBLE_EQ(result.bytes_per_token, 3 * 100.0 / 20);
  EXPECT_GT(result.mean, 0);
  EXPECT_GE(result.stddev, 0);
}

TEST(Throughput, DecodeRunsOneTokenAPass) {
  Tally tally;
  CountingDecoder decoder(tally);
  Monitor monitor;
  const Throughput result = measure_decode(decoder, tally, 16, 2, monitor);
  EXPECT_EQ(decoder.largest, 1);
  EXPECT_EQ(decoder.passes, 4 + 2 * 16);
  EXPECT_EQ(decoder.outputs, decoder.passes);
  EXPECT_DOUBLE_EQ(result.bytes_per_token, 100.0);
}

TEST(Throughput, OneRepetitionHasNoSpread) {
  Tally tally;
  CountingDecoder decoder(tally);
  Monitor monitor;
  EXPECT_EQ(measure_decode(decoder, tally, 2, 1, monitor).stddev, 0);
}

TEST(Throughput, ReportsAndStops) {
  class Stopping : public Monitor {
   public:
    void stage(std::string_view name, std::int64_t total) override {
      stage_name = name;
      stage_total = total;
    }
    void advance(std::int64_t done, std::string_view) override { stop = done == 2; }
    bool cancelled() const override { return stop; }
    std::string stage_name;
    std::int64_t stage_total = 0;
    bool stop = false;
  };
  Tally tally;
  CountingDecoder decoder(tally);
  Stopping monitor;
  EXPECT_THROW(measure_prefill(decoder, tally, 20, 20, 5, monitor), Interrupted);
  EXPECT_EQ(monitor.stage_name, "pp20");
  EXPECT_EQ(monitor.stage_total, 5);
  EXPECT_EQ(decoder.passes, 3);
}

TEST(Throughput, SizesOutOfRangeAreRefused) {
  Tally tally;
  CountingDecoder decoder(tally);
  Monitor monitor;
  EXPECT_THROW(measure_prefill(decoder, tally, 0, 8, 1, monitor), InputError);
  EXPECT_THROW(measure_prefill(decoder, tally, 65, 8, 1, monitor), InputError);
  EXPECT_THROW(measure_prefill(decoder, tally, 8, 0, 1, monitor), InputError);
  EXPECT_THROW(measure_decode(decoder, tally, 8, 0, monitor), InputError);
}

}  // namespace
}  // namespace moesaic::engine
