#pragma once

#include <string>

#include "tests/cudasim/base.h"

namespace cudasim {

/// The PTX of one fat binary for a device of compute capability `arch` (80 for 8.0): the entry of
/// the highest version that is not above it, decompressed. Empty if the fat binary holds none.
/// `wrapper` is what __cudaRegisterFatBinary receives. Throws Error on an unknown format.
std::string ptx_of_fat_binary(const void* wrapper, int arch);

}  // namespace cudasim
