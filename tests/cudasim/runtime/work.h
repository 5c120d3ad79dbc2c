#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tests/cudasim/exec/block.h"
#include "tests/cudasim/runtime/module.h"

namespace cudasim {

struct GraphExec;

struct KernelWork {
  Kernel* kernel = nullptr;
  Dim grid, block;
  u64 dynamic_shared = 0;
  std::vector<std::byte> parameters;
  bool cooperative = false;
};

/// rows × bytes from one address to another; host or device on either side.
struct CopyWork {
  u64 to = 0, from = 0;
  u64 bytes = 0;  // of a row
  u64 rows = 1;
  u64 to_pitch = 0, from_pitch = 0;
};

struct SetWork {
  u64 at = 0;
  u64 width = 0;  // elements of a row
  u64 rows = 1;
  u64 pitch = 0;
  u32 value = 0;
  u32 element = 1;  // bytes: 1, 2, 4
};

/// One thing that a stream or a graph node does.
struct Work {
  enum class Kind { Empty, Kernel, Copy, Set, Host, Library, Allocate, Free, Graph };
  Kind kind = Kind::Empty;
  int device = 0;
  std::string name;
  KernelWork kernel;
  CopyWork copy;
  SetWork set;
  u64 address = 0;                   // Allocate, Free
  std::function<void()> run;         // Host, Library
  std::function<bool()> ready;       // Library: false while others must come first
  std::shared_ptr<GraphExec> graph;  // Graph
};

}  // namespace cudasim
