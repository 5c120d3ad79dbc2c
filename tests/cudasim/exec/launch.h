#pragma once

#include "tests/cudasim/exec/block.h"

namespace cudasim {

/// Runs all blocks of a launch on up to `n_threads` host threads, in the order that its seed gives:
/// 0 ascending, 1 descending, others mixed. Returns what it counted. A fault stops the launch and
/// is left in Launch::report.
Tally run_launch(Launch& launch, int n_threads);

}  // namespace cudasim
