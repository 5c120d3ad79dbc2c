#pragma once

#include <string>

#include "tests/cudasim/runtime/runtime.h"

namespace cudasim {

/// Writes all counters of the process as JSON (docs/cudasim.md lists the keys). Throws Error.
void write_counters(const Runtime& runtime, const std::string& file);

}  // namespace cudasim
