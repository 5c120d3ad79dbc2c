#pragma once

#include <string_view>

#include "tests/cudasim/ptx/ast.h"

namespace cudasim::ptx {

/// Throws Error naming the PTX line for anything it does not know.
Module parse(std::string_view text);

/// Bytes of a type such as "b32" or "f16x2"; "pred" is 4. Throws Error.
u64 type_size(std::string_view type);

}  // namespace cudasim::ptx
