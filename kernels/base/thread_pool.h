#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

namespace moesaic {

/// A half-open range of indices.
struct Range {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::int64_t size() const { return end - begin; }
};

/// Part `part` of `n` items cut into `n_parts` nearly equal consecutive ranges, borders on
/// multiples of `align`. The cut depends on its arguments alone, so a result that is summed per
/// part is the same in every run.
Range split(std::int64_t n, int n_parts, int part, std::int64_t align = 1);

/// Persistent threads that run one function together. Workers spin briefly between calls, then
/// sleep. The calling thread is worker 0. One call at a time.
class ThreadPool {
 public:
  /// n_threads in [1, 1024], the caller included. Throws InputError otherwise, IoError if the
  /// system does not start that many.
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int n_threads() const { return n_threads_; }

  /// Calls fn(thread) once on each thread, thread in [0, n_threads), and returns when all are done.
  /// An exception on any thread is rethrown here (the lowest thread's). Inside fn, barrier() may be
  /// called by all threads alike, in a function that does not throw. Allocates nothing.
  template <class Fn>
  void run(Fn&& fn) {
    auto* target = std::addressof(fn);
    run_erased([](void* f, int thread) { (*static_cast<decltype(target)>(f))(thread); },
               const_cast<void*>(static_cast<const void*>(target)));
  }

  /// Waits until every thread of the current run() has come here.
  void barrier();

  /// A hint: what `thread` reads first in a coming run(). From the end of the next run() until the
  /// one after it, whenever it has to wait, it fetches this into its second-level cache, so that
  /// memory does not idle where threads meet. Between runs only; nothing is read or written.
  void set_read_ahead(int thread, std::span<const std::byte> memory) {
    read_ahead_[static_cast<std::size_t>(thread)] = memory;
  }

 private:
  using Task = void (*)(void*, int);
  void run_erased(Task task, void* arg);
  void worker(int thread);
  void stop();

  int n_threads_;
  std::vector<std::thread> threads_;
  std::vector<std::exception_ptr> errors_;
  std::vector<std::span<const std::byte>> read_ahead_;  // [n_threads]
  Task task_ = nullptr;
  void* arg_ = nullptr;

  alignas(64) std::atomic<std::uint64_t> epoch_{0};  // bumped once per run(); workers wait for it
  alignas(64) std::atomic<int> running_{0};  // workers that have not finished the current run()
  alignas(64) std::atomic<int> barrier_waiting_{0};
  alignas(64) std::atomic<std::uint32_t> barrier_phase_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace moesaic
