#pragma once

#include <cstdint>
#include <filesystem>

#include "tools/options.h"

namespace moesaic::tools {

/// Resident set (VmRSS: mapped file pages touched, heap, stack, the program itself) of a process
/// that has loaded the model, prefilled 512 tokens and decoded 32: measured in a child process of
/// its own, so that two models' figures do not mix. Must be called before this process starts
/// threads. Throws Error if the child could not do its work, Interrupted on Ctrl-C.
std::int64_t measure_resident_bytes(const std::filesystem::path& model, const RunOptions& run);

}  // namespace moesaic::tools
