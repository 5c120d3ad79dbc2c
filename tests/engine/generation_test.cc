#include "engine/generation.h"

#include <gtest/gtest.h>

#include <map>
#include <string>

#include "kernels/base/error.h"
#include "tests/engine/fake_decoder.h"

namespace moesaic::engine {
namespace {

std::string to_text(std::int32_t id) { return "<" + std::to_string(id) + ">"; }

Request greedy(std::vector<std::int32_t> prompt, int max_tokens) {
  Request request;
  request.prompt = std::move(prompt);
  request.max_tokens = max_tokens;
  request.sampling.temperature = 0;
  return request;
}

std::vector<std::int32_t> expected(std::vector<std::int32_t> sequence, int n) {
  const std::size_t n_prompt = sequence.size();
  for (int i = 0; i < n; ++i) sequence.push_back(FakeDecoder::next(sequence));
  return {sequence.begin() + static_cast<std::ptrdiff_t>(n_prompt), sequence.end()};
}

std::vector<Request> several() {
  std::vector<Request> requests;
  for (int i = 0; i < 7; ++i) {
    std::vector<std::int32_t> prompt;
    for (int j = 0; j <= 3 * i; ++j) prompt.push_back((i * 13 + j) % 97);
    requests.push_back(greedy(prompt, 3 + (i * 5) % 11));
  }
  return requests;
}

TEST(Generate, FollowsTheDecoderWhateverTheNumberOfSlotsAndPieces) {
  const std::vector<Request> requests = several();
  for (const int n_parallel : {1, 2, 3, 7, 50}) {
    for (const std::int64_t n_batch : {1, 4, 512}) {
      FakeDecoder decoder;
      const auto results =
          generate(decoder, requests, to_text, {.n_parallel = n_parallel, .n_batch = n_batch});
      ASSERT_EQ(results.size(), requests.size());
      for (std::size_t i = 0; i < results.size(); ++i) {
        EXPECT_EQ(results[i].tokens, expected(requests[i].prompt, requests[i].max_tokens));
        EXPECT_EQ(results[i].finish, FinishReason::Length);
        EXPECT_EQ(results[i].prompt_tokens, static_cast<std::int64_t>(requests[i].prompt.size()));
        std::string text;
        for (const std::int32_t id : results[i].tokens) text += to_text(id);
        EXPECT_EQ(results[i].text, text);
      }
      EXPECT_LE(decoder.largest, std::max<std::int64_t>(n_batch, n_parallel));
    }
  }
}

TEST(Generate, SampledResultsDoNotDependOnTheNumberOfSlots) {
  std::vector<Request> requests = several();
  for (std::size_t i = 0; i < requests.size(); ++i) {
    requests[i].sampling.temperature = 2;
    requests[i].sampling.seed = i;
  }
  FakeDecoder decoder;
  const auto one = generate(decoder, requests, to_text, {.n_parallel = 1});
  const auto four = generate(decoder, requests, to_text, {.n_parallel = 4});
  for (std::size_t i = 0; i < one.size(); ++i) EXPECT_EQ(one[i].tokens, four[i].tokens);
}

TEST(Generate, DecodersThatDrawGiveTheSamplersTokens) {
  std::vector<Request> requests = several();
  for (std::size_t i = 0; i < requests.size(); ++i) {
    SamplingOptions& sampling = requests[i].sampling;
    sampling.temperature = i == 2 ? 0 : 2;
    sampling.seed = i;
    sampling.top_k = i % 2 == 0 ? 0 : 30;
    sampling.top_p = i % 3 == 0 ? 1 : 0.9F;
    sampling.min_p = i == 5 ? 0.02F : 0;
  }
  for (const bool penalty : {false, true}) {
    requests[3].sampling.repeat_penalty = penalty ? 1.3F : 1.0F;
    FakeDecoder plain;
    Drawing<FakeDecoder> drawing;
    const auto expected = generate(plain, requests, to_text, {.n_parallel = 3});
    const auto found = generate(drawing, requests, to_text, {.n_parallel = 3});
    std::int64_t n_tokens = 0;
    for (std::size_t i = 0; i < found.size(); ++i) {
      EXPECT_EQ(found[i].tokens, expected[i].tokens) << i;
      n_tokens += std::ssize(found[i].tokens);
    }
    // A penalty looks back on the tokens so far: passes with that sequence are the sampler's.
    EXPECT_EQ(drawing.n_drawn == n_tokens, !penalty);
    EXPECT_GT(drawing.n_drawn, 0);
  }
}

TEST(Generate, DecodesAllSequencesInOnePass) {
  FakeDecoder decoder;
  const std::vector<Request> requests(4, greedy({1, 2, 3}, 10));
  generate(decoder, requests, to_text, {.n_parallel = 4});
  EXPECT_EQ(decoder.passes, 4 + 9);  // one per prompt, then nine shared
  EXPECT_EQ(decoder.outputs, 4 * 10);
}

TEST(Generate, StopIdEndsAndIsLeftOut) {
  FakeDecoder decoder;
  const auto all = expected({5, 6}, 10);
  Request request = greedy({5, 6}, 10);
  request.stop_ids = {all[4]};
  const auto results = generate(decoder, std::vector{request}, to_text, {});
  EXPECT_EQ(results[0].finish, FinishReason::Stop);
  const auto first = std::find(all.begin(), all.end(), all[4]);
  EXPECT_EQ(results[0].tokens, std::vector<std::int32_t>(all.begin(), first));
}

TEST(Generate, StopStringAcrossTokens) {
  FakeDecoder decoder;
  const auto all = expected({5, 6}, 10);
  Request request = greedy({5, 6}, 10);
  request.stop = {"never", to_text(all[2]).substr(1) + to_text(all[3]).substr(0, 2)};
  std::string streamed;
  const auto results = generate(decoder, std::vector{request}, to_text, {},
                                [&](std::size_t, const std::string& piece) {
                                  streamed += piece;
                                  return true;
                                });
  EXPECT_EQ(results[0].finish, FinishReason::Stop);
  EXPECT_EQ(results[0].text, to_text(all[0]) + to_text(all[1]) + "<");
  EXPECT_EQ(streamed, results[0].text);
}

TEST(Generate, StreamsEveryRequestsText) {
  FakeDecoder decoder;
  const std::vector<Request> requests = several();
  std::map<std::size_t, std::string> streamed;
  const auto results = generate(decoder, requests, to_text, {.n_parallel = 3},
                                [&](std::size_t index, const std::string& piece) {
                                  streamed[index] += piece;
                                  return true;
                                });
  for (std::size_t i = 0; i < results.size(); ++i) EXPECT_EQ(streamed[i], results[i].text);
}

TEST(Generate, CharacterSplitOverTokensComesWhole) {
  FakeDecoder decoder;
  const std::string euro = "€";
  int calls = 0;
  const TokenToText bytes = [&](std::int32_t) { return euro.substr(calls++ % 3, 1); };
  std::vector<std::string> pieces;
  const auto results = generate(decoder, std::vector{greedy({1}, 7)}, bytes, {},
                                [&](std::size_t, const std::string& piece) {
                                  pieces.push_back(piece);
                                  return true;
                                });
  EXPECT_EQ(pieces, (std::vector<std::string>{"€", "€", "\xEF\xBF\xBD"}));
  EXPECT_EQ(results[0].text, "€€\xEF\xBF\xBD");
}

TEST(Generate, ReaderCancelsOneRequest) {
  FakeDecoder decoder;
  const std::vector<Request> requests(3, greedy({1, 2}, 6));
  const auto results = generate(decoder, requests, to_text, {.n_parallel = 2},
                                [&](std::size_t index, const std::string&) { return index != 1; });
  EXPECT_EQ(results[0].finish, FinishReason::Length);
  EXPECT_EQ(results[1].finish, FinishReason::Cancelled);
  EXPECT_EQ(results[1].tokens.size(), 1U);
  EXPECT_EQ(results[2].tokens, expected({1, 2}, 6));
}

TEST(Generate, CancelEndsAllWithWhatTheyHave) {
  FakeDecoder decoder;
  std::atomic<bool> cancel = false;
  const std::vector<Request> requests(3, greedy({1, 2}, 20));
  int pieces = 0;
  const auto results = generate(decoder, requests, to_text, {.n_parallel = 2, .cancel = &cancel},
                                [&](std::size_t, const std::string&) {
                                  cancel = ++pieces == 6;
                                  return true;
                                });
  ASSERT_EQ(results.size(), 3U);
  for (const Completion& c : results) EXPECT_EQ(c.finish, FinishReason::Cancelled);
  EXPECT_EQ(results[0].tokens, expected({1, 2}, 3));
  EXPECT_EQ(results[1].tokens, expected({1, 2}, 3));
  EXPECT_TRUE(results[2].tokens.empty());
}

TEST(Generate, CancelBeforeTheStartRunsNothing) {
  FakeDecoder decoder;
  const std::atomic<bool> cancel = true;
  const auto results = generate(decoder, std::vector{greedy({1}, 5)}, to_text, {.cancel = &cancel});
  EXPECT_EQ(results[0].finish, FinishReason::Cancelled);
  EXPECT_EQ(decoder.passes, 0);
}

TEST(Generate, EndOfTheContextEnds) {
  FakeDecoder decoder(10);
  const auto unlimited = generate(decoder, std::vector{greedy({1, 2, 3}, -1)}, to_text, {});
  EXPECT_EQ(unlimited[0].finish, FinishReason::Length);
  EXPECT_EQ(unlimited[0].tokens, expected({1, 2, 3}, 7));
  const auto small = generate(decoder, std::vector{greedy({1, 2, 3}, 100)}, to_text, {.n_ctx = 5});
  EXPECT_EQ(small[0].tokens, expected({1, 2, 3}, 2));
  const auto full = generate(decoder, std::vector{greedy({1, 2, 3}, 100)}, to_text, {.n_ctx = 3});
  EXPECT_TRUE(full[0].tokens.empty());
  EXPECT_EQ(full[0].finish, FinishReason::Length);
}

TEST(Generate, NothingToDo) {
  FakeDecoder decoder;
  EXPECT_TRUE(generate(decoder, {}, to_text, {}).empty());
  const auto results = generate(decoder, std::vector{greedy({1}, 0)}, to_text, {});
  EXPECT_TRUE(results[0].tokens.empty());
  EXPECT_EQ(results[0].finish, FinishReason::Length);
  EXPECT_EQ(decoder.passes, 0);
}

void expect_refused(const std::vector<Request>& requests, const GenerateOptions& options,
                    const std::string& text) {
  FakeDecoder decoder(10);
  try {
    generate(decoder, requests, to_text, options);
    FAIL() << "accepted, expected: " << text;
  } catch (const InputError& e) {
    EXPECT_NE(std::string(e.what()).find(text), std::string::npos) << e.what();
  }
}

TEST(Generate, BadRequestsAreNamed) {
  const Request good = greedy({1}, 1);
  expect_refused({good, greedy({}, 1)}, {}, "request 1");
  expect_refused({greedy(std::vector<std::int32_t>(11, 1), 1)}, {}, "request 0");
  expect_refused({good, greedy({1, 2, 3}, 1)}, {.n_ctx = 2}, "request 1");
  expect_refused({greedy({1}, -2)}, {}, "max_tokens");
  Request stop = good;
  stop.stop = {""};
  expect_refused({stop}, {}, "stop");
  Request sampling = good;
  sampling.sampling.top_p = 2;
  expect_refused({good, sampling}, {}, "request 1: top_p");
  expect_refused({good}, {.n_ctx = 11}, "n_ctx");
  expect_refused({good}, {.n_parallel = 0}, "n_parallel");
  expect_refused({good}, {.n_batch = 0}, "n_batch");
}

}  // namespace
}  // namespace moesaic::engine
