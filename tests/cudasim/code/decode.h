#pragma once

#include <functional>
#include <memory>
#include <string>

#include "tests/cudasim/code/program.h"

namespace cudasim {

/// Address of a module's .global or .const variable on the device the program is decoded for;
/// throws Error for a name the module does not have.
using SymbolAddress = std::function<u64(const std::string&)>;

/// Decodes a kernel. Throws Error with the instruction's text for an opcode, a modifier or an
/// operand that is not modelled. `module` must outlive the program.
std::unique_ptr<Program> decode(const ptx::Module& module, const ptx::Function& kernel,
                                const SymbolAddress& address);

}  // namespace cudasim
