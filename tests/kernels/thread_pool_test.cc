#include "kernels/base/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <string>

#include "kernels/base/error.h"

namespace moesaic {
namespace {

TEST(Split, CoversEverythingOnceInOrder) {
  for (const std::int64_t n : {0, 1, 2, 7, 64, 1000}) {
    for (const int parts : {1, 2, 3, 8, 100}) {
      for (const std::int64_t align : {1, 4, 16}) {
        std::int64_t next = 0;
        for (int part = 0; part < parts; ++part) {
          const Range r = split(n, parts, part, align);
          EXPECT_EQ(r.begin, next);
          EXPECT_LE(r.begin, r.end);
          EXPECT_TRUE(r.begin % align == 0 || r.begin == n);
          next = r.end;
        }
        EXPECT_EQ(next, n);
      }
    }
  }
}

TEST(Split, PartsDifferByOneUnitAtMost) {
  for (int part = 0; part < 8; ++part) {
    const std::int64_t size = split(1001, 8, part).size();
    EXPECT_TRUE(size == 125 || size == 126);
  }
}

TEST(ThreadPool, RefusesAnImpossibleCount) {
  EXPECT_THROW(ThreadPool(0), InputError);
  EXPECT_THROW(ThreadPool(-3), InputError);
  EXPECT_THROW(ThreadPool(1025), InputError);
}

TEST(ThreadPool, EndsRightAfterItBegan) {
  for (int i = 0; i < 200; ++i) ThreadPool pool(1 + i % 5);
}

TEST(ThreadPool, EndsAfterOneRun) {
  for (int i = 0; i < 50; ++i) {
    std::atomic<int> calls{0};
    {
      ThreadPool pool(3);
      pool.run([&](int) { ++calls; });
    }
    EXPECT_EQ(calls, 3);
  }
}

class ThreadPoolOf : public testing::TestWithParam<int> {};

TEST_P(ThreadPoolOf, CallsEachThreadOncePerRun) {
  ThreadPool pool(GetParam());
  // Plain integers: run() itself must order them.
  std::vector<int> calls(static_cast<std::size_t>(pool.n_threads()), 0);
  for (int i = 1; i <= 2000; ++i) {
    pool.run([&](int thread) { ++calls[static_cast<std::size_t>(thread)]; });
    ASSERT_EQ(calls, std::vector<int>(calls.size(), i));
  }
}

TEST_P(ThreadPoolOf, WakesThreadsThatSleep) {
  ThreadPool pool(GetParam());
  int total = 0;
  for (int i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // longer than workers spin
    std::atomic<int> calls{0};
    pool.run([&](int) { ++calls; });
    total += calls;
  }
  EXPECT_EQ(total, 20 * pool.n_threads());
}

// The hint is taken between runs, while workers spin: a race here is what TSan would find.
TEST_P(ThreadPoolOf, ReadAheadLeavesRunsAsTheyAre) {
  ThreadPool pool(GetParam());
  const std::vector<std::byte> memory(1 << 16);
  std::vector<int> calls(static_cast<std::size_t>(pool.n_threads()), 0);
  for (int i = 1; i <= 500; ++i) {
    for (int thread = 0; thread < pool.n_threads(); ++thread) {
      // Not a multiple of a cache line, nothing, and past what anybody waits for.
      const std::size_t bytes = i % 3 == 0 ? 0 : i % 3 == 1 ? 100 : memory.size();
      pool.set_read_ahead(thread, std::span(memory).first(bytes));
    }
    pool.run([&](int thread) { ++calls[static_cast<std::size_t>(thread)]; });
    ASSERT_EQ(calls, std::vector<int>(calls.size(), i));
  }
}

TEST_P(ThreadPoolOf, RunsAtTheMomentWorkersFallAsleep) {
  ThreadPool pool(GetParam());
  std::atomic<int> calls{0};
  for (int i = 0; i < 300; ++i) {
    // Sweeps the pause over the end of the workers' spinning.
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(i);
    while (std::chrono::steady_clock::now() < until) {
    }
    pool.run([&](int) { ++calls; });
  }
  EXPECT_EQ(calls, 300 * pool.n_threads());
}

TEST_P(ThreadPoolOf, BarrierSeparatesPhases) {
  ThreadPool pool(GetParam());
  const auto n = static_cast<std::size_t>(pool.n_threads());
  constexpr int kPhases = 200;
  std::vector<int> written(n, -1);
  std::vector<int> wrong(n, 0);
  for (int run = 0; run < 3; ++run) {
    pool.run([&](int thread) {
      const auto me = static_cast<std::size_t>(thread);
      for (int phase = 0; phase < kPhases; ++phase) {
        written[me] = phase;
        pool.barrier();
        for (const int w : written) wrong[me] += w != phase;
        pool.barrier();
      }
    });
  }
  EXPECT_EQ(std::accumulate(wrong.begin(), wrong.end(), 0), 0);
}

TEST_P(ThreadPoolOf, RethrowsAndGoesOn) {
  ThreadPool pool(GetParam());
  for (int i = 0; i < 50; ++i) {
    for (int thrower = 0; thrower < pool.n_threads(); ++thrower) {
      std::string text;
      try {
        pool.run([&](int thread) {
          if (thread == thrower) throw InputError(std::to_string(thread));
        });
      } catch (const InputError& e) {
        text = e.what();
      }
      EXPECT_EQ(text, std::to_string(thrower));
    }
    std::atomic<int> calls{0};
    EXPECT_NO_THROW(pool.run([&](int) { ++calls; }));
    EXPECT_EQ(calls, pool.n_threads());
  }
}

TEST_P(ThreadPoolOf, RethrowsTheLowestThreads) {
  ThreadPool pool(GetParam());
  std::string text;
  try {
    pool.run([&](int thread) { throw InputError(std::to_string(thread)); });
  } catch (const InputError& e) {
    text = e.what();
  }
  EXPECT_EQ(text, "0");
}

// 5 is more than the cores of the machines this usually runs on.
INSTANTIATE_TEST_SUITE_P(Threads, ThreadPoolOf, testing::Values(1, 2, 3, 5));

}  // namespace
}  // namespace moesaic
