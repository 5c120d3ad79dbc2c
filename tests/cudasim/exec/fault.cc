#include "tests/cudasim/exec/fault.h"

namespace cudasim {

const char* name_of(Finding f) {
  switch (f) {
    case Finding::OutOfBounds:
      return "out-of-bounds";
    case Finding::UseAfterFree:
      return "use-after-free";
    case Finding::Uninitialised:
      return "uninitialised-read";
    case Finding::Misaligned:
      return "misaligned";
    case Finding::SharedRace:
      return "shared-race";
    case Finding::GlobalRace:
      return "global-race";
    case Finding::AsyncRace:
      return "async-copy-race";
    case Finding::BarrierDivergence:
      return "barrier-divergence";
    case Finding::WarpMask:
      return "warp-mask";
    case Finding::ReadOnlyWritten:
      return "read-only-written";
    case Finding::Assertion:
      return "assertion";
    case Finding::Unsupported:
      return "unsupported";
    case Finding::Trap:
      return "trap";
    case Finding::Timeout:
      return "timeout";
  }
  return "unknown";
}

}  // namespace cudasim
