#include "kernels/base/thread_pool.h"

#include <algorithm>
#include <system_error>
#include <utility>

#include "kernels/base/error.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moesaic {
namespace {

// About 50 µs of spinning: longer than the gap between two kernels of a decode step, shorter than a
// scheduler slice.
constexpr int kSpins = 4000;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// One step of a busy wait: a few lines of what this thread will read, while there are any.
void pass_time(std::span<const std::byte>& read_ahead) {
  constexpr std::size_t kLine = 64;
  constexpr int kLinesPerPause = 4;  // about 10 GB/s
  for (int i = 0; i < kLinesPerPause && !read_ahead.empty(); ++i) {
    __builtin_prefetch(read_ahead.data(), 0, 2);
    read_ahead = read_ahead.subspan(std::min(kLine, read_ahead.size()));
  }
  pause();
}

// Waits until `value` is no longer in a state that `waiting` holds for: spins first, then sleeps in
// the kernel until notified. Yielding instead would give a whole time slice to whoever else is
// busy. The change that is waited for must be sequentially consistent: notify skips the system call
// when it sees no sleeper, and a weaker store could still be on its way while it looks, after the
// sleeper has seen the old value.
template <class T, class Waiting>
void spin_then_wait(const std::atomic<T>& value, Waiting&& waiting,
                    std::span<const std::byte> read_ahead = {}) {
  T now = value.load(std::memory_order_acquire);
  for (int i = 0; waiting(now); ++i) {
    if (i < kSpins) {
      pass_time(read_ahead);
    } else {
      value.wait(now, std::memory_order_acquire);
    }
    now = value.load(std::memory_order_acquire);
  }
}

}  // namespace

Range split(std::int64_t n, int n_parts, int part, std::int64_t align) {
  const std::int64_t units = (n + align - 1) / align;
  const std::int64_t begin = units * part / n_parts * align;
  const std::int64_t end = units * (part + 1) / n_parts * align;
  return {std::min(begin, n), std::min(end, n)};
}

ThreadPool::ThreadPool(int n_threads) : n_threads_(n_threads) {
  require<InputError>(n_threads >= 1 && n_threads <= 1024, "threads: {} given, expected 1 to 1024",
                      n_threads);
  errors_.resize(static_cast<std::size_t>(n_threads));
  read_ahead_.resize(static_cast<std::size_t>(n_threads));
  threads_.reserve(static_cast<std::size_t>(n_threads));
  try {
    for (int i = 1; i < n_threads; ++i) threads_.emplace_back([this, i] { worker(i); });
  } catch (const std::system_error& e) {
    const std::size_t n_started = threads_.size() + 1;
    stop();
    throw IoError(fmt::format("threads: {} started, expected {}: {}", n_started, n_threads,
                              e.code().message()));
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& t : threads_) t.join();
}

void ThreadPool::run_erased(Task task, void* arg) {
  if (n_threads_ == 1) {
    task(arg, 0);
    return;
  }
  task_ = task;
  arg_ = arg;
  running_.store(n_threads_ - 1, std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    const std::lock_guard lock(mutex_);
    wake_.notify_all();
  }
  try {
    task(arg, 0);
  } catch (...) {
    errors_[0] = std::current_exception();
  }
  spin_then_wait(
      running_, [](int running) { return running != 0; }, std::exchange(read_ahead_[0], {}));
  for (std::exception_ptr& e : errors_) {
    if (e) {
      std::exception_ptr first = e;
      std::fill(errors_.begin(), errors_.end(), nullptr);
      std::rethrow_exception(first);
    }
  }
}

void ThreadPool::worker(int thread) {
  std::uint64_t seen = 0;
  std::span<const std::byte> read_ahead;
  for (;;) {
    bool ready = false;
    for (int i = 0; i < kSpins && !ready; ++i) {
      ready = epoch_.load(std::memory_order_acquire) != seen;
      if (!ready) pass_time(read_ahead);
    }
    if (!ready) {
      std::unique_lock lock(mutex_);
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return stop_ || epoch_.load(std::memory_order_seq_cst) != seen; });
      sleepers_.fetch_sub(1, std::memory_order_relaxed);
      if (stop_ && epoch_.load(std::memory_order_relaxed) == seen) return;
    }
    ++seen;
    try {
      task_(arg_, thread);
    } catch (...) {
      errors_[static_cast<std::size_t>(thread)] = std::current_exception();
    }
    read_ahead = std::exchange(read_ahead_[static_cast<std::size_t>(thread)], {});
    if (running_.fetch_sub(1, std::memory_order_seq_cst) == 1) running_.notify_one();
  }
}

void ThreadPool::barrier() {
  if (n_threads_ == 1) return;
  const std::uint32_t phase = barrier_phase_.load(std::memory_order_relaxed);
  if (barrier_waiting_.fetch_add(1, std::memory_order_acq_rel) == n_threads_ - 1) {
    barrier_waiting_.store(0, std::memory_order_relaxed);
    barrier_phase_.store(phase + 1, std::memory_order_seq_cst);
    barrier_phase_.notify_all();
    return;
  }
  spin_then_wait(barrier_phase_, [phase](std::uint32_t now) { return now == phase; });
}

}  // namespace moesaic
