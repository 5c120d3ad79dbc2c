#include "tests/cudasim/exec/launch.h"

#include <algorithm>
#include <deque>
#include <memory>
#include <numeric>
#include <thread>

namespace cudasim {
namespace {

// Warp instructions that a block runs before another gets its turn: never reached but by a block
// that waits for another one.
constexpr u64 kSlice = 4'000'000;
constexpr u64 kCooperativeSlice = 2'000;
constexpr std::size_t kMaxResident = 64;

// The n-th block to run, of `count`.
u64 nth_block(u64 n, u64 count, u64 seed) {
  if (seed == 0) return n;
  if (seed == 1) return count - 1 - n;
  // n ↦ (stride n + first) mod count runs through all blocks if the stride has no factor of count.
  std::mt19937_64 random(seed);
  const u64 first = random() % count;
  u64 stride = random() % count;
  while (std::gcd(stride, count) != 1) stride = (stride + 1) % count;
  return static_cast<u64>((static_cast<u128>(stride) * n + first) % count);
}

class Worker {
 public:
  Worker(Launch& launch, std::atomic<u64>& next) : launch_(launch), next_(next) {
    tally.issued.resize(launch.program->code.size());
    tally.lanes.resize(launch.program->code.size());
  }

  void run() {
    try {
      loop();
    } catch (const std::exception& e) {
      stop({Finding::Unsupported, e.what()});
    }
    --launch_.n_awake;
  }

  Tally tally;

 private:
  void loop() {
    const u64 slice = launch_.cooperative ? kCooperativeSlice : kSlice;
    while (launch_.cooperative && take()) {
    }
    while (take() || !resident_.empty()) {
      // One turn for each block that is here.
      const u64 turns = launch_.turns;
      bool awake = false;
      for (std::size_t k = resident_.size(); k > 0 && !launch_.stop; --k) {
        auto block = std::move(resident_.front());
        resident_.pop_front();
        const bool done = run_block(*block, slice);
        if (done || !block->asleep) awake = true, ++launch_.turns;
        if (done) {
          spare_.push_back(std::move(block));
        } else {
          resident_.push_back(std::move(block));
        }
      }
      if (launch_.stop) return;
      if (launch_.cooperative && !awake) wait_for_others(turns);
    }
  }

  // All blocks here wait for blocks of other threads: what they would issue meanwhile says nothing
  // about the kernel.
  void wait_for_others(u64 turns) {
    --launch_.n_awake;
    while (launch_.n_awake > 0 && launch_.turns == turns && !launch_.stop)
      std::this_thread::yield();
    ++launch_.n_awake;
  }

  bool take() {
    const u64 count = launch_.grid.count();
    if (!launch_.cooperative && resident_.size() >= kMaxResident) return false;
    const u64 n = next_.fetch_add(1);
    if (n >= count || launch_.stop) return false;
    std::unique_ptr<Block> block;
    if (spare_.empty()) {
      block = std::make_unique<Block>();
    } else {
      block = std::move(spare_.back());
      spare_.pop_back();
    }
    block->start(launch_, nth_block(n, count, launch_.seed), tally);
    resident_.push_back(std::move(block));
    return true;
  }

  bool run_block(Block& block, u64 slice) {
    std::string where;
    try {
      return block.run(slice, where);
    } catch (const Fault& fault) {
      stop({fault.finding, where});
      return true;
    }
  }

  void stop(Report report) {
    const std::lock_guard lock(launch_.mutex);
    if (launch_.report == nullptr) launch_.report = std::make_unique<Report>(std::move(report));
    launch_.stop = true;
  }

  Launch& launch_;
  std::atomic<u64>& next_;
  std::deque<std::unique_ptr<Block>> resident_;
  std::vector<std::unique_ptr<Block>> spare_;
};

}  // namespace

Tally run_launch(Launch& launch, int n_threads) {
  std::atomic<u64> next{0};
  const u64 n = std::min<u64>(static_cast<u64>(std::max(1, n_threads)), launch.grid.count());
  std::vector<std::unique_ptr<Worker>> workers;
  for (u64 k = 0; k < n; ++k) workers.push_back(std::make_unique<Worker>(launch, next));
  launch.n_awake = static_cast<int>(n);
  std::vector<std::thread> threads;
  for (u64 k = 1; k < n; ++k) threads.emplace_back([&, k] { workers[k]->run(); });
  workers[0]->run();
  for (auto& t : threads) t.join();
  Tally total;
  for (const auto& w : workers) total.add(w->tally);
  return total;
}

}  // namespace cudasim
