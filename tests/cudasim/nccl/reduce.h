#pragma once

#include <nccl.h>

#include <vector>

#include "tests/cudasim/base.h"

namespace cudasim::nccl {

/// Bytes of an element; 0 for a type that is not modelled.
std::size_t size_of(ncclDataType_t type);

/// out[i] = the parts' elements first + i, combined in the order of the ranks; sums of halves are
/// in float32 and rounded once.
void combine(const std::vector<std::vector<std::byte>>& parts, std::size_t first, std::size_t count,
             ncclDataType_t type, ncclRedOp_t op, void* out);

}  // namespace cudasim::nccl
