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

// Looks at the places of every row.
class PlacesDecoder : public FakeDecoder {
 public:
  void forward(const Batch& batch, KvCache& cache, Matrix logits) override {
    FakeDecoder::forward(batch, cache, logits);
    slots.emplace_back(batch.slots.begin(), batch.slots.end());
    positions.emplace_back(batch.positions.begin(), batch.positions.end());
    n_outputs.push_back(batch.outputs.size());
    n_slots = cache.n_slots();
    capacity = cache.capacity();
  }
  std::vector<std::vector<std::int32_t>> slots, positions;  // of each pass
  std::vector<std::size_t> n_outputs;
  std::int64_t n_slots = 0, capacity = 0;
};

using Ids = std::vector<std::int32_t>;

TEST(Throughput, SequencesAdvanceTogetherByOneTokenAPass) {
  Tally tally;
  PlacesDecoder decoder;
  Monitor monitor;
  const Work work{.n_gen = 5, .n_sequences = 3};
  const Throughput result = measure(decoder, tally, work, 2, monitor);
  EXPECT_EQ(work.n_tokens(), 15);
  EXPECT_EQ(decoder.n_slots, 3);
  EXPECT_EQ(decoder.capacity, 5);
  ASSERT_EQ(decoder.passes, 4 + 2 * 5);
  EXPECT_EQ(decoder.rows, 3 * decoder.passes);
  EXPECT_EQ(decoder.outputs, decoder.rows);
  for (std::size_t pass = 4; pass < decoder.slots.size(); ++pass) {
    EXPECT_EQ(decoder.slots[pass], (Ids{0, 1, 2}));
    EXPECT_EQ(decoder.positions[pass], Ids(3, static_cast<std::int32_t>((pass - 4) % 5)));
  }
  EXPECT_EQ(result.tokens_per_second.size(), 2U);
}

TEST(Throughput, BytesPerTokenCountEverySequence) {
  Tally tally;
  CountingDecoder decoder(tally);
  Monitor monitor;
  EXPECT_DOUBLE_EQ(
      measure(decoder, tally, {.n_gen = 6, .n_sequences = 4}, 2, monitor).bytes_per_token,
      100.0 / 4);
}

TEST(Throughput, DepthIsFilledOnceAndNotTimed) {
  Tally tally;
  PlacesDecoder decoder;
  Monitor monitor;
  measure(decoder, tally, {.n_gen = 2, .n_sequences = 2, .depth = 5, .n_batch = 3}, 3, monitor);
  EXPECT_EQ(decoder.capacity, 7);
  // Two passes of 3 + 2 for each sequence, without logits; then warm-up and three repetitions.
  ASSERT_EQ(decoder.passes, 4 + 2 + 3 * 2);
  EXPECT_EQ(decoder.positions[0], (Ids{0, 1, 2}));
  EXPECT_EQ(decoder.positions[1], (Ids{3, 4}));
  EXPECT_EQ(decoder.slots[2], (Ids{1, 1, 1}));
  EXPECT_EQ(decoder.outputs, 2 * (2 + 3 * 2));
  for (std::size_t pass = 4; pass < decoder.positions.size(); ++pass) {
    EXPECT_EQ(decoder.positions[pass], Ids(2, 5 + static_cast<std::int32_t>(pass % 2)));
  }
}

TEST(Throughput, PrefillGoesOnFromTheDepth) {
  Tally tally;
  PlacesDecoder decoder;
  Monitor monitor;
  measure(decoder, tally, {.n_prompt = 4, .depth = 3, .n_batch = 3}, 1, monitor);
  // Depth; warm-up of 3 + 1; the timed run of 3 + 1.
  ASSERT_EQ(decoder.passes, 1 + 2 + 2);
  EXPECT_EQ(decoder.positions[3], (Ids{3, 4, 5}));
  EXPECT_EQ(decoder.positions[4], (Ids{6}));
  EXPECT_EQ(decoder.n_outputs, (std::vector<std::size_t>{0, 0, 1, 0, 1}));
}

TEST(Throughput, DepthUpToTheContextIsTaken) {
  Tally tally;
  PlacesDecoder decoder;
  Monitor monitor;
  measure(decoder, tally, {.n_gen = 1, .depth = 63}, 1, monitor);
  EXPECT_EQ(decoder.positions.back(), (Ids{63}));
  EXPECT_THROW(measure(decoder, tally, {.n_gen = 1, .depth = 64}, 1, monitor), InputError);
}

TEST(Throughput, Names) {
  EXPECT_EQ((Work{.n_prompt = 512}).name(), "pp512");
  EXPECT_EQ((Work{.n_gen = 128}).name(), "tg128");
  EXPECT_EQ((Work{.n_gen = 128, .n_sequences = 16, .depth = 64}).name(), "tg128 x16 @ d64");
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
  for (const Work& work :
       {Work{}, Work{.n_prompt = 8, .n_gen = 8}, Work{.n_prompt = 8, .n_sequences = 2},
        Work{.n_gen = 8, .n_sequences = 0}, Work{.n_gen = 8, .depth = -1}}) {
    EXPECT_THROW(measure(decoder, tally, work, 1, monitor), InputError) << work.name();
  }
}

}  // namespace
}  // namespace moesaic::engine
