#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "tests/cudasim/code/program.h"

namespace cudasim {

/// An instruction of a kernel with all calls expanded. Registers are indices into Flat::registers;
/// symbols of local memory and call parameters have become numbers.
struct FlatIns {
  ptx::Instruction ptx;
  std::vector<u32> targets;      // of a branch: indices into Flat::code
  std::vector<u64> call_slots;   // of a call to a built-in function: local offsets, results first
  std::string callee;            // likewise
  bool local_parameter = false;  // ld.param / st.param of a call: lies in local memory
};

struct Flat {
  std::vector<FlatIns> code;
  std::vector<u8> register_bytes;  // 0: predicate
  u64 local_bytes = 0;
};

/// Expands `kernel`. Functions without a body are left as calls to built-in ones. Throws Error on
/// recursion and on indirect calls.
Flat flatten(const ptx::Module& module, const ptx::Function& kernel);

}  // namespace cudasim
