#pragma once

#include "tests/cudasim/code/flatten.h"

namespace cudasim {

/// Where each register of Flat lies in a warp's register file. Registers that never live at the
/// same time in one lane share a place (linear scan over liveness): a warp's file then fits the
/// caches.
struct RegisterFile {
  std::vector<Place> place;  // by register; kNowhere: never used
  u64 bytes = 0;
  u32 most_live = 0;  // in units of 32 bits
};

RegisterFile allocate(const Flat& flat);

/// True if argument k of the instruction is written (and not read) by it.
bool is_destination(const ptx::Instruction& i, std::size_t k);

}  // namespace cudasim
