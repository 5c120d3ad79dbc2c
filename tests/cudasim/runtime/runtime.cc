#include "tests/cudasim/runtime/runtime.h"

#include <driver_types.h>
#include <unistd.h>

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "tests/cudasim/count/counters.h"
#include "tests/cudasim/exec/launch.h"

namespace cudasim {
namespace {

constexpr int kReportedStatus = 86;

int error_of(Finding f) {
  switch (f) {
    case Finding::OutOfBounds:
    case Finding::UseAfterFree:
      return cudaErrorIllegalAddress;
    case Finding::Misaligned:
      return cudaErrorMisalignedAddress;
    case Finding::Assertion:
      return cudaErrorAssert;
    case Finding::Timeout:
      return cudaErrorLaunchTimeout;
    case Finding::Unsupported:
      return cudaErrorNotSupported;
    default:
      return cudaErrorLaunchFailure;
  }
}

}  // namespace

Runtime& Runtime::get() {
  // Never destroyed: static objects of the program may still call in when it ends.
  static Runtime* runtime = [] {
    try {
      return new Runtime();
    } catch (const std::exception& e) {
      std::fprintf(stderr, "cudasim: %s\n", e.what());
      std::_Exit(kReportedStatus);
    }
  }();
  return *runtime;
}

Runtime::Runtime()
    : config(config_from_environment()), streams(config.schedule, [this](Task& t) { execute(t); }) {
  for (int d = 0; d < config.devices; ++d) arena.set_capacity(d, config.memory);
  std::atexit([] { Runtime::get().at_exit(); });
}

ThreadState& thread_state() {
  thread_local ThreadState state;
  return state;
}

Kernel* Runtime::kernel(const void* function) {
  if (const auto found = kernels.find(function); found != kernels.end()) return found->second.get();
  for (const auto& [host, k] : kernels) {
    if (k.get() == function) return k.get();
  }
  return nullptr;
}

const Program& Runtime::program(const Kernel& k, int device) {
  try {
    return k.module->program(k.name, device, arena);
  } catch (const Error& e) {
    // Nothing sensible can follow: the program would compute with what never ran.
    std::fprintf(stderr, "cudasim: %s\n", e.what());
    std::fflush(nullptr);
    std::_Exit(kReportedStatus);
  }
}

void Runtime::execute(Task& task) {
  while (task.work.ready && !task.work.ready()) {
    // A collective: other host threads must get in to enqueue their part.
    mutex.unlock();
    std::this_thread::sleep_for(std::chrono::microseconds(200));
    mutex.lock();
    if (task.done) return;
  }
  execute(task.work);
}

void Runtime::execute(const Work& work) {
  if (sticky != 0) return;  // the context is lost, as on a device
  try {
    switch (work.kind) {
      case Work::Kind::Empty:
        break;
      case Work::Kind::Kernel:
        run_kernel(work.kernel, work.device);
        break;
      case Work::Kind::Copy:
        run_copy(work.copy);
        break;
      case Work::Kind::Set:
        run_set(work.set);
        break;
      case Work::Kind::Host:
        ++process.host_functions;
        work.run();
        break;
      case Work::Kind::Library:
        ++process.library_calls;
        work.run();
        break;
      case Work::Kind::Allocate:
        arena.activate(work.address);
        break;
      case Work::Kind::Free:
        arena.release(work.address);
        break;
      case Work::Kind::Graph:
        ++process.graph_launches;
        for (const std::size_t k : work.graph->order(config.schedule)) {
          if (work.graph->nodes[k].enabled) execute(work.graph->nodes[k].work);
        }
        break;
    }
  } catch (const Fault& f) {
    report({f.finding, fmt::format("{}: {}\n  in {}", name_of(f.finding), f.text, work.name)});
  }
}

void Runtime::run_kernel(const KernelWork& k, int device) {
  const Program& program = this->program(*k.kernel, device);
  Launch launch;
  launch.program = &program;
  launch.arena = &arena;
  launch.grid = k.grid;
  launch.block = k.block;
  launch.parameters = k.parameters;
  launch.dynamic_shared = k.dynamic_shared;
  launch.device = device;
  launch.places = 1u << device | 1u << Arena::kHost | peers[device];
  launch.id = next_launch_++;
  const u64 blocks = k.grid.count();
  if (next_tag_ > 0xffffffffu - blocks - 1) fail("too many blocks for one process");
  launch.first_tag = next_tag_;
  next_tag_ += static_cast<u32>(blocks);
  launch.seed = config.schedule;
  launch.cooperative = k.cooperative;
  if (k.cooperative) {
    // Cooperative groups count arrivals in a word of it.
    launch.workspace = arena.allocate(device, 64, 256, "grid workspace");
    std::memset(reinterpret_cast<void*>(launch.workspace), 0, 64);
    arena.set_state(launch.workspace, 64, kInitialised);
  }
  launch.max_instructions = config.max_instructions;
  launch.registered = registered;
  const Tally tally = run_launch(launch, config.threads);
  if (launch.workspace != 0) arena.release(launch.workspace);
  std::fputs(launch.output.c_str(), stdout);
  ++process.kernel_launches;
  KernelCounts& c = counts[k.kernel->name];
  c.readable = program.readable;
  c.program = &program;
  ++c.launches;
  c.blocks += blocks;
  c.threads += blocks * k.block.count();
  c.live_registers = program.live_registers;
  c.shared_bytes = std::max(c.shared_bytes, program.declared_shared + k.dynamic_shared);
  c.local_bytes = program.local_bytes;
  c.tally.add(tally);
  if (launch.report != nullptr) report(*launch.report);
}

void Runtime::check_range(u64 address, u64 bytes, const char* what) const {
  if (bytes == 0 || !arena.contains(address)) return;  // pageable host memory
  const u64 bad = arena.contains(address, bytes) ? arena.first_bad(address, bytes, true) : 0;
  if (bad == bytes) return;
  const bool freed = *arena.state(address + bad) == kFreed;
  throw Fault{
      freed ? Finding::UseAfterFree : Finding::OutOfBounds, -1,
      fmt::format("{} {} bytes at {:#x}: {}", what, bytes, address, arena.describe(address + bad))};
}

void Runtime::run_copy(const CopyWork& c) {
  ++process.copies;
  process.copied_bytes += c.bytes * c.rows;
  for (u64 r = 0; r < c.rows; ++r) {
    const u64 to = c.to + r * c.to_pitch, from = c.from + r * c.from_pitch;
    check_range(from, c.bytes, "copy reads");
    check_range(to, c.bytes, "copy writes");
    std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), c.bytes);
    if (!arena.contains(to)) continue;
    // What has not been written stays so where it is copied to.
    if (arena.contains(from)) {
      std::memmove(arena.state(to), arena.state(from), c.bytes);
    } else {
      arena.set_state(to, c.bytes, kInitialised);
    }
  }
}

void Runtime::run_set(const SetWork& s) {
  ++process.sets;
  for (u64 r = 0; r < s.rows; ++r) {
    const u64 at = s.at + r * s.pitch, bytes = s.width * s.element;
    check_range(at, bytes, "memset writes");
    auto* p = reinterpret_cast<std::byte*>(at);
    for (u64 k = 0; k < s.width; ++k) std::memcpy(p + k * s.element, &s.value, s.element);
    if (arena.contains(at)) arena.set_state(at, bytes, kInitialised);
  }
}

void Runtime::report(Report r) {
  std::fprintf(stderr, "cudasim: %s\n", r.text.c_str());
  sticky = error_of(r.finding);
  reports.push_back(std::move(r));
}

void Runtime::at_exit() {
  const std::lock_guard lock(mutex);
  if (!config.counters.empty()) {
    try {
      write_counters(*this, config.counters);
    } catch (const std::exception& e) {
      std::fprintf(stderr, "cudasim: %s\n", e.what());
    }
  }
  for (int d = 0; config.leaks && d < config.devices; ++d) {
    const auto leaked = arena.live(d, "cudaMalloc");
    u64 bytes = 0;
    for (const auto& [base, a] : leaked) bytes += a.size;
    if (!leaked.empty()) {
      std::fprintf(stderr, "cudasim: warning: %zu allocations of device %d not freed, %llu bytes\n",
                   leaked.size(), d, static_cast<unsigned long long>(bytes));
    }
  }
  if (reports.empty()) return;
  std::fprintf(stderr, "cudasim: %zu reports\n", reports.size());
  std::fflush(nullptr);
  _exit(kReportedStatus);
}

}  // namespace cudasim
