#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "tests/cudasim/exec/tally.h"
#include "tests/cudasim/runtime/config.h"
#include "tests/cudasim/runtime/stream.h"

namespace cudasim {

/// Sums over all launches of one kernel.
struct KernelCounts {
  std::string readable;
  u64 launches = 0;
  u64 blocks = 0;
  u64 threads = 0;
  u64 minimum_bytes =
      0;  // what the program says its algorithm must move, see cudasim_minimum_bytes
  u32 live_registers = 0;
  u64 shared_bytes = 0;  // of the largest block
  u64 local_bytes = 0;   // of a thread
  Tally tally;
  const Program* program = nullptr;
};

struct ProcessCounts {
  u64 kernel_launches = 0, graph_launches = 0, copies = 0, sets = 0, host_functions = 0;
  u64 library_calls = 0, synchronisations = 0, allocations = 0;
  u64 copied_bytes = 0;
};

/// A process's stand-in device: what the C functions of cudart share. All members but what is
/// thread-local are used with `mutex` held.
class Runtime {
 public:
  static Runtime& get();

  std::recursive_mutex mutex;
  const Config config;
  Arena arena;
  Streams streams;
  std::map<const void*, std::unique_ptr<Kernel>> kernels;  // by host function
  std::vector<std::unique_ptr<Module>> modules;
  struct Variable {
    Module* module;
    std::string name;
  };
  std::map<const void*, Variable> variables;  // by host variable
  std::vector<Launch::HostRange> registered;
  u32 peers[Arena::kPlaces] = {};  // by device: devices whose memory it may reach, as bits
  std::map<std::string, KernelCounts> counts;  // by mangled name
  ProcessCounts process;
  std::vector<Report> reports;  // of faults nobody has taken
  int sticky = 0;               // cudaError_t that a fault leaves behind

  /// Null if the host function or handle is unknown.
  Kernel* kernel(const void* function);
  const Program& program(const Kernel& k, int device);

  void execute(Task& task);
  void execute(const Work& work);
  /// Sets the sticky error and prints the report.
  void report(Report r);
  /// Writes counters, warns of leaks; the exit status becomes 86 if a report was not taken.
  void at_exit();

 private:
  Runtime();
  void run_kernel(const KernelWork& k, int device);
  void run_copy(const CopyWork& c);
  void run_set(const SetWork& s);
  /// Throws Fault unless the bytes are addressable device memory, or host memory.
  void check_range(u64 address, u64 bytes, const char* what) const;

  u32 next_launch_ = 1;
  u32 next_tag_ = 1;
};

/// Of this host thread.
struct ThreadState {
  int device = 0;
  int last_error = 0;
  struct Configuration {
    Dim grid, block;
    u64 shared = 0;
    void* stream = nullptr;
  };
  std::vector<Configuration> pushed;
};
ThreadState& thread_state();

}  // namespace cudasim
