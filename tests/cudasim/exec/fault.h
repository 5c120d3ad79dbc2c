#pragma once

#include <string>

#include "tests/cudasim/base.h"

namespace cudasim {

/// What a checker found. Names are stable: they are what a mutation test asks for.
enum class Finding {
  OutOfBounds,
  UseAfterFree,
  Uninitialised,
  Misaligned,
  SharedRace,
  GlobalRace,
  AsyncRace,  // use of shared memory that a cp.async is still writing
  BarrierDivergence,
  WarpMask,
  ReadOnlyWritten,  // ld.nc of what the same kernel writes
  Assertion,
  Unsupported,
  Trap,
  Timeout,
};

const char* name_of(Finding f);

/// Thrown by an instruction; the block that runs it adds where and who.
struct Fault {
  Finding finding;
  int lane;  // -1: the warp
  std::string text;
};

}  // namespace cudasim
