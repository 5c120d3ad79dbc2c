#pragma once

#include <deque>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "tests/cudasim/runtime/graph.h"

namespace cudasim {

struct Stream;

/// Work in a stream, and what must have happened before it.
struct Task {
  Work work;
  Stream* stream = nullptr;
  std::vector<std::shared_ptr<Task>> after;  // besides what comes before in the stream
  bool done = false;
  double done_at = 0;  // seconds of the host's clock
};

/// Capture of streams into a graph.
struct Capture {
  Graph* graph = nullptr;
  Stream* origin = nullptr;
  std::set<Stream*> streams;
  u64 id = 0;
  int mode = 0;
  bool invalid = false;
};

struct Stream {
  int device = 0;
  bool blocking = true;  // synchronises with the legacy default stream
  int priority = 0;
  u64 id = 0;
  std::deque<std::shared_ptr<Task>> queue;
  std::shared_ptr<Task> last;  // the youngest task, done or not
  std::shared_ptr<Capture> capture;
  std::vector<GraphNode*> captured;  // what the next node depends on
};

struct Event {
  int device = 0;
  bool timed = true;
  std::shared_ptr<Task> task;  // recorded as
  std::shared_ptr<Capture> capture;
  std::vector<GraphNode*> captured;
};

/// The streams of a process. Nothing runs when it is enqueued: work runs when something waits for
/// it, and then only what it depends on (seed 0), or in a mixture that the seed picks.
class Streams {
 public:
  Streams(u64 seed, std::function<void(Task&)> execute)
      : seed_(seed), random_(seed), execute_(std::move(execute)) {}

  Stream* create(int device, bool blocking, int priority);
  /// Work still in it runs first, as the system does.
  void destroy(Stream* s);
  bool exists(const Stream* s) const;
  Stream* legacy(int device);

  std::shared_ptr<Task> enqueue(Stream* s, Work work,
                                std::vector<std::shared_ptr<Task>> after = {});
  void finish(const std::shared_ptr<Task>& task);
  void finish_stream(Stream* s);
  void finish_device(int device);
  void finish_all();
  /// Runs one task of the stream, so that a program that polls gets on.
  void progress(Stream* s);

 private:
  void run_front(Stream* s);
  Stream* pick(int device);

  u64 seed_;
  std::mt19937_64 random_;
  std::function<void(Task&)> execute_;
  std::vector<std::unique_ptr<Stream>> streams_;
  std::vector<Stream*> legacy_;
  u64 next_id_ = 1;
};

}  // namespace cudasim
