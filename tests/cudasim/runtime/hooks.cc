#include "tests/cudasim/runtime/hooks.h"

#include <algorithm>
#include <cstring>

#include "tests/cudasim/runtime/api.h"

using namespace cudasim;  // the file is all extern "C" functions

extern "C" {

std::size_t cudasim_take_report(char* text, std::size_t size) {
  Runtime& r = Runtime::get();
  const std::lock_guard lock(r.mutex);
  r.sticky = 0;
  thread_state().last_error = 0;
  if (r.reports.empty()) return 0;
  const std::string s = r.reports.front().text;
  r.reports.erase(r.reports.begin());
  if (size > 0) {
    const std::size_t n = std::min(size - 1, s.size());
    std::memcpy(text, s.data(), n);
    text[n] = '\0';
  }
  return s.size();
}

std::size_t cudasim_report_count() {
  Runtime& r = Runtime::get();
  const std::lock_guard lock(r.mutex);
  return r.reports.size();
}

void cudasim_suballocate(const void* allocation) {
  call([&](Runtime& r) {
    r.arena.suballocate(reinterpret_cast<u64>(allocation));
    return cudaSuccess;
  });
}

void cudasim_region(const void* p, std::size_t bytes, int live) {
  call([&](Runtime& r) {
    if (live == 0) r.streams.finish_all();
    r.arena.region(reinterpret_cast<u64>(p), bytes, live != 0);
    return cudaSuccess;
  });
}

void cudasim_minimum_bytes(const char* kernel, std::uint64_t bytes) {
  call([&](Runtime& r) {
    r.streams.finish_all();
    for (auto& [name, c] : r.counts) {
      if (name == kernel || c.readable.find(kernel) != std::string::npos) c.minimum_bytes += bytes;
    }
    return cudaSuccess;
  });
}

int cudasim_enqueue(void* stream, const char* name, void (*run)(void*), int (*ready)(void*),
                    void (*drop)(void*), void* data) {
  return call([&](Runtime& r) {
    const std::shared_ptr<void> owned(data, drop);
    Work work;
    work.kind = Work::Kind::Library;
    work.device = thread_state().device;
    work.name = name;
    work.run = [run, owned] { run(owned.get()); };
    if (ready != nullptr) work.ready = [ready, owned] { return ready(owned.get()) != 0; };
    return submit(r, static_cast<cudaStream_t>(stream), std::move(work));
  });
}

void cudasim_progress(void* stream, int device) {
  Runtime& r = Runtime::get();
  const int before = std::exchange(thread_state().device, device);
  if (Stream* s = stream_of(r, static_cast<cudaStream_t>(stream))) r.streams.progress(s);
  thread_state().device = before;
}

void cudasim_check(const void* p, std::size_t bytes, int read, const char* what) {
  const Runtime& r = Runtime::get();
  const u64 at = reinterpret_cast<u64>(p);
  if (bytes == 0) return;
  if (!r.arena.contains(at, bytes)) {
    throw Fault{Finding::OutOfBounds, -1, fmt::format("{} at {:#x} is no device memory", what, at)};
  }
  u64 bad = r.arena.first_bad(at, bytes, true);
  if (bad != bytes) {
    const bool freed = *r.arena.state(at + bad) == kFreed;
    throw Fault{freed ? Finding::UseAfterFree : Finding::OutOfBounds, -1,
                fmt::format("{} of {} bytes: {}", what, bytes, r.arena.describe(at + bad))};
  }
  bad = read != 0 ? r.arena.first_bad(at, bytes, false) : bytes;
  if (bad != bytes) {
    throw Fault{
        Finding::Uninitialised, -1,
        fmt::format("{} reads what nothing has written: {}", what, r.arena.describe(at + bad))};
  }
  if (read == 0) {
    Runtime::get().arena.set_state(at, bytes, kInitialised);
  }
}

void cudasim_fail(const char* text) { throw Fault{Finding::Unsupported, -1, text}; }

}  // extern "C"
