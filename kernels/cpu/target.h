#pragma once

#include <string_view>
#include <vector>

namespace moesaic::kernels {

/// Instruction sets that kernels/cpu has code for and this machine runs, best first: names as in
/// MOESAIC_TARGET ("avx512", "avx2", "sse4", "ssse3", "scalar").
std::vector<std::string_view> simd_targets();

/// Makes all kernels use this one from now on; "" gives the choice back to the machine. Not while a
/// kernel runs. For tests and for comparing. Throws InputError for a name that simd_targets() does
/// not list.
void use_simd_target(std::string_view name);

/// Obeys the environment variable MOESAIC_TARGET, once per process. Called by the kernels.
void obey_target_environment();

}  // namespace moesaic::kernels
