#include "tests/cudasim/runtime/stream.h"

#include <algorithm>
#include <chrono>

namespace cudasim {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Stream* Streams::create(int device, bool blocking, int priority) {
  streams_.push_back(std::make_unique<Stream>());
  Stream* s = streams_.back().get();
  s->device = device;
  s->blocking = blocking;
  s->priority = priority;
  s->id = next_id_++;
  return s;
}

void Streams::destroy(Stream* s) {
  finish_stream(s);
  std::erase_if(streams_, [&](const auto& p) { return p.get() == s; });
}

bool Streams::exists(const Stream* s) const {
  return std::any_of(streams_.begin(), streams_.end(), [&](const auto& p) { return p.get() == s; });
}

Stream* Streams::legacy(int device) {
  const auto k = static_cast<std::size_t>(device);
  if (legacy_.size() <= k) legacy_.resize(k + 1);
  if (legacy_[k] == nullptr) legacy_[k] = create(device, true, 0);
  return legacy_[k];
}

std::shared_ptr<Task> Streams::enqueue(Stream* s, Work work,
                                       std::vector<std::shared_ptr<Task>> after) {
  auto task = std::make_shared<Task>();
  task->work = std::move(work);
  task->stream = s;
  task->after = std::move(after);
  Stream* const base = legacy(s->device);
  if (s == base) {
    for (const auto& other : streams_) {
      const bool waits = other->blocking && other.get() != s && other->device == s->device;
      if (waits && other->last != nullptr) task->after.push_back(other->last);
    }
  } else if (s->blocking && base->last != nullptr) {
    task->after.push_back(base->last);
  }
  std::erase_if(task->after, [](const auto& t) { return t->done; });
  s->queue.push_back(task);
  s->last = task;
  // Other schedules let some work run early.
  if (seed_ != 0) {
    for (u64 n = random_() % 3; n > 0; --n) {
      Stream* early = pick(-1);
      if (early == nullptr ||
          (early->queue.front()->work.ready && !early->queue.front()->work.ready()))
        break;
      run_front(early);
    }
  }
  return task;
}

// The front task of a stream, after all that it depends on.
void Streams::run_front(Stream* s) {
  const auto task = s->queue.front();
  for (const auto& before : task->after) finish(before);
  if (task->done) return;  // a host function or a wait for others may have come here first
  execute_(*task);
  task->done = true;
  task->done_at = now();
  task->after.clear();
  if (!s->queue.empty() && s->queue.front() == task) s->queue.pop_front();
}

void Streams::finish(const std::shared_ptr<Task>& task) {
  while (!task->done) run_front(task->stream);
}

void Streams::finish_stream(Stream* s) {
  while (!s->queue.empty()) run_front(s);
}

Stream* Streams::pick(int device) {
  std::vector<Stream*> waiting;
  for (const auto& s : streams_) {
    if (!s->queue.empty() && (device < 0 || s->device == device)) waiting.push_back(s.get());
  }
  if (waiting.empty()) return nullptr;
  // The youngest stream first: most programs create the one others depend on first.
  return seed_ == 0 ? waiting.back() : waiting[random_() % waiting.size()];
}

void Streams::finish_device(int device) {
  while (Stream* s = pick(device)) run_front(s);
}

void Streams::finish_all() {
  while (Stream* s = pick(-1)) run_front(s);
}

void Streams::progress(Stream* s) {
  if (!s->queue.empty()) run_front(s);
}

}  // namespace cudasim
