#include "tests/cudasim/runtime/module.h"

#include <algorithm>

#include "tests/cudasim/ptx/fatbin.h"
#include "tests/cudasim/ptx/parser.h"

namespace cudasim {

const ptx::Module& Module::parsed() {
  if (module_ == nullptr) {
    text_ = ptx_of_fat_binary(fat_binary_, arch_);
    module_ = std::make_unique<ptx::Module>(ptx::parse(text_));
  }
  return *module_;
}

const ptx::Function* Module::kernel(const std::string& name) {
  const ptx::Function* f = parsed().find(name);
  return f != nullptr && f->is_entry ? f : nullptr;
}

bool Module::has_variable(const std::string& name) {
  const auto& all = parsed().variables;
  return std::any_of(all.begin(), all.end(), [&](const auto& v) {
    return v.name == name && (v.space == "global" || v.space == "const");
  });
}

void Module::lay_out(int device, Arena& arena) {
  auto& addresses = variables_[device];
  if (!addresses.empty()) return;
  for (const auto& v : parsed().variables) {
    if (v.space != "global" && v.space != "const") continue;
    if (v.is_extern) fail("variable {} is defined in another unit: not modelled", v.name);
    const char* qualifier = v.space == "const" ? "__constant__" : "__device__";
    const u64 at = arena.allocate(device, std::max<u64>(v.size, 1), std::max<u64>(v.align, 16),
                                  fmt::format("{} {}", qualifier, v.name));
    if (at == 0) fail("no device memory for variable {}", v.name);
    // Static storage begins as zeros.
    auto* memory = reinterpret_cast<std::byte*>(at);
    std::fill_n(memory, v.size, std::byte{0});
    std::copy(v.image.begin(), v.image.end(), memory);
    arena.set_state(at, v.size, kInitialised);
    addresses[v.name] = at;
  }
  for (const auto& v : parsed().variables) {
    for (const auto& patch : v.patches) {
      const auto target = addresses.find(patch.symbol);
      if (target == addresses.end()) {
        fail("variable {}: address of {} in its initial value is not modelled", v.name,
             patch.symbol);
      }
      const u64 value = target->second + static_cast<u64>(patch.addend);
      std::memcpy(reinterpret_cast<void*>(addresses.at(v.name) + patch.offset), &value, 8);
    }
  }
}

const Program& Module::program(const std::string& name, int device, Arena& arena) {
  auto& program = programs_[{device, name}];
  if (program == nullptr) {
    lay_out(device, arena);
    const ptx::Function* f = kernel(name);
    if (f == nullptr)
      fail("kernel {}: no PTX for compute capability {}.{}", name, arch_ / 10, arch_ % 10);
    program = decode(*module_, *f,
                     [&](const std::string& symbol) { return variables_[device].at(symbol); });
  }
  return *program;
}

u64 Module::variable(const std::string& name, int device, Arena& arena, u64& size) {
  lay_out(device, arena);
  for (const auto& v : parsed().variables) {
    if (v.name != name) continue;
    size = v.size;
    return variables_[device].at(name);
  }
  fail("no variable {}", name);
}

}  // namespace cudasim
