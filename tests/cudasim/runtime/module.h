#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "tests/cudasim/code/decode.h"
#include "tests/cudasim/memory/arena.h"

namespace cudasim {

/// The device code of one translation unit: parsed when first used, its variables laid out and its
/// kernels decoded once for each device.
class Module {
 public:
  Module(const void* fat_binary, int arch) : fat_binary_(fat_binary), arch_(arch) {}

  /// Null if the module has no kernel of that name (no PTX for the device, or another unit's).
  const ptx::Function* kernel(const std::string& name);
  const Program& program(const std::string& kernel, int device, Arena& arena);
  /// Address on a device and size of a variable; throws Error for an unknown name.
  u64 variable(const std::string& name, int device, Arena& arena, u64& size);
  bool has_variable(const std::string& name);

 private:
  const ptx::Module& parsed();
  void lay_out(int device, Arena& arena);

  const void* fat_binary_;
  int arch_;
  std::string text_;
  std::unique_ptr<ptx::Module> module_;
  std::map<int, std::map<std::string, u64>> variables_;  // by device
  std::map<std::pair<int, std::string>, std::unique_ptr<Program>> programs_;
};

/// A __global__ function as the host knows it.
struct Kernel {
  Module* module = nullptr;
  std::string name;
  std::map<int, u64> max_dynamic_shared;  // by device; what cudaFuncSetAttribute set
};

}  // namespace cudasim
