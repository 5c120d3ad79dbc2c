#pragma once

#include <string>

#include "tests/cudasim/base.h"

namespace cudasim {

/// What the environment asks for (docs/cudasim.md lists the variables).
struct Config {
  u64 schedule = 0;                   // CUDASIM_SCHEDULE
  std::string counters;               // CUDASIM_COUNTERS: file, empty: none
  int devices = 1;                    // CUDASIM_DEVICES
  int arch = 80;                      // CUDASIM_ARCH
  int multiprocessors = 8;            // CUDASIM_SMS
  u64 memory = 16ull << 30;           // CUDASIM_MEMORY, in GiB
  int threads = 0;                    // CUDASIM_THREADS, 0: one per core
  u64 max_instructions = 1ull << 33;  // CUDASIM_MAX_INSTRUCTIONS, of a block
  bool leaks = true;                  // CUDASIM_LEAKS
};

/// Throws Error naming the variable for a value that is no number or out of range.
Config config_from_environment();

}  // namespace cudasim
